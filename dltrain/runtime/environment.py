"""Where this process stands: one read-only snapshot of what the launcher said. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dltrain.errors import UserError


@dataclass(frozen=True)
class Environment:
    """Rank and world as torchrun names them; one process alone is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

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
        """From ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; absent ones mean one process."""
        variables = os.environ if variables is None else variables
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            rank, world, local, local_world = (int(variables.get(n, d)) for n, d in zip(names, "0101", strict=True))
        except ValueError as error:
            raise UserError(
                f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}"
            ) from None
        if "LOCAL_WORLD_SIZE" not in variables and world > 1:
            local_world = world
        if not 0 <= rank < world or world % local_world:
            raise UserError(
                f"RANK is {rank}, WORLD_SIZE {world}, LOCAL_WORLD_SIZE {local_world}: ranks must lie in the world and "
                "every host must run the same number of ranks"
            )
        return cls(rank, world, local, local_world)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
