"""What ranks tell each other as Python's objects, a few times in a run; alone, a process tells itself.

damage = [found for found in gathered(mine) if found]
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The value of each rank by number, on all of them; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's value on every rank; collective. Of a shared disk, say, which ranks may see at different moments."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Until every rank has come; collective."""
    if dist.is_initialized():
        dist.barrier()
