"""Where this process stands: one read-only snapshot of what the launcher said. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dltrain.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
HOSTS = "GROUP_WORLD_SIZE"
"""torchrun's variable of the number of hosts."""
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Of MPICH, Intel MPI and their like."""


@dataclass(frozen=True)
class Environment:
    """Rank and world as torchrun names them; one process alone is rank 0 of 1.

    ``launcher`` is torchrun (or what sets its variables), slurm or mpi; empty where nobody started several ranks.
    ``head`` is the host of rank 0, where the launcher tells it by other names than torchrun's.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = ""
    head: str = ""

    @property
    def nodes(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def node(self) -> int:
        return self.rank // self.local_world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes logs and records."""
        return self.rank == 0

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """From torchrun's variables, else those of a step of Slurm's, else MPI's; without any this is one process.

        Raises :class:`UserError` for ranks that do not lie in their world, and hosts with unequal numbers of ranks.
        """
        variables = os.environ if variables is None else variables
        if "RANK" in variables or "WORLD_SIZE" in variables:
            return _numbered(variables, TORCHRUN, "torchrun")
        # srun's own: a batch script, too, is told the number of tasks that it may start
        if "SLURM_STEP_ID" in variables and "SLURM_STEP_NUM_TASKS" in variables:
            return _of_slurm(variables)
        for names in (_OPEN_MPI, _PMI):
            if names[0] in variables and names[1] in variables:
                head = variables.get("MASTER_ADDR", "")
                return _numbered(variables, names, "mpi", head)
        return cls()


def _numbered(variables: Mapping[str, str], names: tuple[str, ...], launcher: str, head: str = "") -> Environment:
    try:
        rank, world, local, local_world = (int(variables.get(n, d)) for n, d in zip(names, "0101", strict=True))
        hosts = int(variables.get(HOSTS) or 0) if launcher == "torchrun" else 0
    except ValueError as error:
        raise UserError(f"{', '.join(names[:-1])} and {names[-1]} must be whole numbers: {error}") from None
    if names[-1] not in variables and world > 1:
        local_world = world
    if hosts and hosts * local_world != world:
        raise UserError(
            f"this host runs {local_world} rank(s) of {world}, and there are {hosts} hosts: every host must run the "
            "same number; take hosts of one kind, or give the same --nproc (--nproc-per-node of torchrun) on each"
        )
    if not 0 <= rank < world or local_world < 1 or world % local_world:
        raise UserError(
            f"{names[0]} is {rank}, {names[1]} {world}, {names[3]} {local_world}: ranks must lie in the world and "
            "every host must run the same number of ranks"
        )
    alone = world == 1 and launcher != "torchrun"
    return Environment(rank, world, local, local_world, "" if alone else launcher, head)


def _of_slurm(variables: Mapping[str, str]) -> Environment:
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE", variables["SLURM_STEP_NUM_TASKS"])
    if not re.fullmatch(r"\d+(\(x\d+\))?", tasks):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {tasks}: every host must run the same number of ranks; "
                        "give srun --ntasks-per-node")  # fmt: skip
    told = {**variables, "_LOCAL": tasks.partition("(")[0]}
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "_LOCAL")
    return _numbered(told, names, "slurm", first_host(variables.get("SLURM_STEP_NODELIST", "")))


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes them: ``gpu-[03-05,9],login`` gives ``gpu-03``."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "" if match is None else f"{match[1]}{match[2] or ''}{match[3]}"


def rendezvous(environment: Environment, variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of torch's that a launcher other than torchrun has not set: ranks, and where rank 0 listens.

    Of a Slurm step the port follows from the job's number; of MPI it is ``MASTER_PORT``, or 29500.
    """
    if environment.launcher not in ("slurm", "mpi"):
        return {}
    ranks = (environment.rank, environment.world_size, environment.local_rank, environment.local_world_size)
    job = variables.get("SLURM_JOB_ID", "0")
    port = 29500 + (int(job) % 20000 if job.isdecimal() else 0)
    head = environment.head or ("127.0.0.1" if environment.nodes == 1 else "")
    found = {**dict(zip(TORCHRUN, map(str, ranks), strict=True)), "MASTER_ADDR": head, "MASTER_PORT": str(port)}
    return {name: value for name, value in found.items() if value and name not in variables}


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
