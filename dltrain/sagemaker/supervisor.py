"""The entry point of a training container: ``python -m dltrain.sagemaker [RECIPE] [--preset NAME] [--nproc N] ...``

It is fit to be process 1. It reads what SageMaker has laid down, refuses mistakes before anything is started, waits for
the other hosts, starts this host's ranks by torchrun, hands signals on, and leaves a failure file and an exit status
that say what happened: 0, 2 after the user's mistake, 75 where the job was asked to stop and has saved.

Recipe, preset and settings come from hyperparameters (``recipe``, ``preset``, ``optim__learning_rate``) or from the
words of the command.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from dltrain.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from dltrain.runtime.environment import cores
from dltrain.runtime.launch import RECIPE
from dltrain.runtime.stop import STARTED
from dltrain.runtime.word import FAILURES
from dltrain.sagemaker.failure import write_reason
from dltrain.sagemaker.folders import Folders
from dltrain.sagemaker.minding import Minded
from dltrain.sagemaker.network import variables_for
from dltrain.sagemaker.start import Start, install_requirements, read_start
from dltrain.sagemaker.training_job import TrainingJob
from dltrain.sagemaker.verdict import verdict

PORT = 7777
"""Where the first host listens for the others, as in SageMaker's own containers."""

WAIT = "DLTRAIN_HOSTS_TIMEOUT"
"""Variable: seconds that hosts have to come, 600 if it is not set."""

GRACE = 110.0
"""Seconds that ranks have to save: SageMaker kills 120 after its signal."""


def main(arguments: Sequence[str]) -> int:
    """Run this host's part of the job; returns the exit status."""
    folders, began = Folders.read(), time.time()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # process 1 gets no signal that it has no handler of
    try:
        job = TrainingJob.read()
        if job is None:
            raise UserError(
                f"there is no training job here: {folders.config} has no resourceconfig.json; start a recipe outside "
                "SageMaker with dltrain train, or try its container with dltrain launch local --as-sagemaker"
            )
        for told in job.hyperparameters.told:
            print(f"dltrain: {told}", file=sys.stderr)
        install_requirements(job)
        start = read_start(job, job.hyperparameters.arguments(arguments))
        network = variables_for(job.instance_type, job.interface, len(job.hosts))
        wait_for(job, float(os.environ.get(WAIT) or 600))
        return _run(job, start, network, began)
    except _Interrupted as signalled:
        print(f"dltrain: {signalled} came before any rank was started", file=sys.stderr, flush=True)
        write_reason(folders, f"{signalled} came before any rank was started")
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"dltrain: error: {error}", file=sys.stderr, flush=True)
        write_reason(folders, str(error))
        return EXIT_USER_ERROR


class _Interrupted(Exception):
    """A signal came; its name."""


def _leave(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(signal.Signals(number).name)


def wait_for(job: TrainingJob, seconds: float) -> None:
    """Until the names of all hosts are known; others start later, and their names come with them. Raises
    :class:`UserError` naming those that have not come."""
    until, pause = time.monotonic() + seconds, 0.2
    left = list(job.hosts)
    while left := [host for host in left if not _is_known(host)]:
        if time.monotonic() > until:
            raise UserError(
                f"after {seconds:g} s {', '.join(left)} of {len(job.hosts)} hosts are not found by name: have they "
                "started? Look, or start the job again"
            )
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _run(job: TrainingJob, start: Start, network: Mapping[str, str], began: float) -> int:
    with tempfile.TemporaryDirectory(prefix="dltrain-") as folder:
        words, report = Path(folder) / "words", Path(folder) / "report.json"
        words.mkdir()
        usual = {
            **network,
            "OMP_NUM_THREADS": str(start.config.run.threads or max(1, cores() // start.nproc)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        own = {FAILURES: str(words), RECIPE: start.name, STARTED: str(began)}
        minded = Minded(command_of(job, start, report), {**usual, **os.environ, **own}, words, GRACE)
        status = minded.run()
        return verdict(job, minded, status, words, report)


def command_of(job: TrainingJob, start: Start, report: Path) -> list[str]:
    """torchrun's own words: all hosts meet at the first one."""
    torchrun = [sys.executable, "-m", "dltrain.runtime.elastic", str(report), f"--nproc-per-node={start.nproc}"]
    if len(job.hosts) == 1:
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # a free port
    else:
        wait = int(float(os.environ.get(WAIT) or 600))
        torchrun += [
            f"--nnodes={len(job.hosts)}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={job.hosts[0]}:{PORT}",
            f"--rdzv-id={job.name or 'dltrain'}",
            f"--rdzv-conf=is_host={int(job.rank_of_host == 0)},join_timeout={wait},read_timeout={wait}",
            f"--local-addr={job.host}",
        ]
    return [*torchrun, str(start.recipe), "train", *start.arguments]
