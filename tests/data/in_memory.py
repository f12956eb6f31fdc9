"""A data set without files: samples that say where they stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dltrain.data.order import Integers, SampleOrder
from dltrain.data.sample import Sample

Place = tuple[int, int]
"""Shard and index."""


@dataclass(frozen=True)
class InMemory:
    """Samples with the fields ``shard`` and ``index``, and those given in ``extra``."""

    shard_sizes: tuple[int, ...]
    name: str = "memory"
    facts: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return f"{self.name}{self.shard_sizes}"

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        pairs = list(zip(shards.tolist(), indices.tolist(), strict=True))
        assert all(0 <= index < self.shard_sizes[shard] for shard, index in pairs)
        return [Sample(f"{self.name}/{s}/{i}", {"shard": s, "index": i, **self.extra}, self.name) for s, i in pairs]


def arrays(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
    """The transform: every field as an array, and a random number that depends on seed and position."""
    drawn = -1.0 if random is None else random.random()
    return {"random": np.asarray(drawn), **{name: np.asarray(value) for name, value in sample.fields.items()}}


def places(order: SampleOrder, positions: Iterable[int] | Integers) -> list[Place]:
    """Where the samples at the positions stand."""
    shards, indices = order.locate(np.fromiter(positions, dtype=np.int64))
    return list(zip(shards.tolist(), indices.tolist(), strict=True))
