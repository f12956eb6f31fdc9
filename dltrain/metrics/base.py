"""Metrics as sums: what a rank has seen is a few float64 tensors that add up over batches and over ranks.

So a score is exact on any number of ranks, costs one reduction at the end, and never needs predictions in one place.
Samples without a position are padding and count for nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.data.batch import Batch

Scores = dict[str, float]


class Metric(Protocol):
    """Scores of one evaluation."""

    sums: dict[str, Tensor]
    """Float64 tensors on the CPU, added over ranks by :func:`reduce_sums`."""

    def update(self, outputs: Any, losses: Tensor, batch: Batch) -> None:
        """Add a batch. ``losses`` are the task's values per sample, [n]."""
        ...

    def compute(self) -> Scores:
        """Scores of all that was added; valid after the sums were reduced."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """This rank's most telling samples (the worst mistakes), as JSON, for the report."""
        ...

    def report(self, folder: Path, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
        """Write pictures into ``folder``; returns details as JSON, and the pictures with their titles."""
        ...


@runtime_checkable
class Curved(Metric, Protocol):
    """A metric that has curves of precision and recall as well."""

    def curves(self) -> dict[str, Tensor]:
        """By name, counts of samples by the probability they were given, float64 [2, bins]: of those that are what the
        curve is of, and of those that are not. Bin i begins at i / (bins - 1); valid after the sums were reduced."""
        ...


def reduce_sums(metric: Metric) -> None:
    """Add the sums of all ranks, in place, by one collective. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names = sorted(metric.sums)
    packed = torch.cat([metric.sums[name].reshape(-1) for name in names])
    dist.all_reduce(packed)
    parts = torch.split(packed, [metric.sums[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        metric.sums[name] = part.reshape(metric.sums[name].shape)


def worst(candidates: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The ``count`` examples of greatest loss, ties by key, so that the choice does not depend on the ranks."""
    return sorted(candidates, key=lambda example: (-example["loss"], example["key"]))[:count]
