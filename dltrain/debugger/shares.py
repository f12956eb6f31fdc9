"""Ratios of counts that add up over samples: how often a unit is active, what a channel's mean is, how many samples a
class has. They are made of the counts of all ranks that see other samples, once, when they are due.

    shares = Shares()
    shares.add("active/relu", torch.stack([positive, looked_at]))  # float64 [2, units]
    for name, values in shares.taken(group): ...  # float32 [units], on one rank of the group
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

LEAST = 0.01
"""Of the elements: a unit that is active in fewer is dead."""

_OF_UNITS = ("active", "unsaturated")


class Shares:
    """Counts by name, float64 [2, n]: what is divided, and by what. All ranks of a group have the same names."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, counts: Tensor) -> None:
        """More counts of that name; of labels there may be more than before."""
        before = self._counts.get(name)
        self._counts[name] = counts if before is None else before + counts

    def taken(self, group: dist.ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
        """Ratios since last time by name, on the group's first rank; collective. Of units 0 stands for less than
        :data:`LEAST`."""
        found, self._counts = self._counts, {}
        if not found:
            return
        counts = torch.cat(list(found.values()), 1)
        if group is not None:
            dist.all_reduce(counts, group=group)
            if dist.get_rank(group):
                return
        parts = torch.split(counts, [each.shape[1] for each in found.values()], 1)
        for name, (above, below) in zip(found, parts, strict=True):
            values = above / below.clamp(min=1)
            if name.partition("/")[0] in _OF_UNITS:
                values = torch.where(values < LEAST, 0.0, values)
            yield name, values.float()
