"""Where one node will read next: the order of data as seen by its disk.

A node takes the positions of its own ranks, and so reads some of the lanes; each lane walks along the epoch's line of
shards, window by window. From that alone follow the shards needed now and next, when a shard is needed again, and how
much must be kept. Arrays are as long as the list of shards, never as the data.

    route = Route(order, shard_bytes, node=0, nodes=2)
    soon = route.ahead(position=0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dltrain.data.order import Integers, Pass, fields_of

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Stops:
    """An epoch's shards on one node, by first use; a shard that two lanes share stands here twice."""

    shard: Integers
    first: Integers
    """First window that touches the shard."""
    last: Integers
    """Last window that touches it."""
    windows: int
    """Windows of the longest lane."""


@runtime_checkable
class Line(Protocol):
    """An order of samples as a route sees it."""

    @property
    def lanes(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def samples(self) -> int: ...

    def walk(self, epoch: int) -> Pass: ...


@dataclass(frozen=True, eq=False)
class Route:
    """The way of node ``node`` of ``nodes`` through ``order``; ``shard_bytes`` in the order of the manifest."""

    order: Line
    shard_bytes: Integers
    node: int = 0
    nodes: int = 1

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)

    def window(self, position: int) -> tuple[int, int]:
        """Epoch, and window within each lane, of a position."""
        epoch, place = divmod(position, self.order.samples)
        return epoch, place // self.order.lanes // self.order.window

    def stops(self, epoch: int) -> Stops:
        """The node's shards in the order of their first use."""
        return self._stops(epoch)

    @cached_property
    def _stops(self) -> Callable[[int], Stops]:
        return lru_cache(maxsize=4)(lambda epoch: _stops(self.order, self.node, self.nodes, epoch))

    def ahead(self, position: int) -> Iterator[tuple[int, int]]:
        """Shards from ``position`` on and windows until each is needed; each once in an epoch, and without end."""
        epoch, window = self.window(position)
        passed = -window
        while True:
            stops, seen = self.stops(epoch), set[int]()
            for shard, first, last in zip(stops.shard.tolist(), stops.first.tolist(), stops.last.tolist(), strict=True):
                if passed + last >= 0 and shard not in seen:
                    seen.add(shard)
                    yield shard, max(0, passed + first)
            passed += stops.windows
            epoch += 1

    def next_use(self, position: int) -> Numbers:
        """Windows until each shard is needed: 0 now, 1 in the next window; infinity beyond the next epoch."""
        epoch, window = self.window(position)
        until = np.full(len(self.shard_bytes), np.inf)
        stops, following = self.stops(epoch), self.stops(epoch + 1)
        np.minimum.at(until, following.shard, stops.windows - window + following.first)
        left = stops.last >= window
        np.minimum.at(until, stops.shard[left], np.maximum(0, stops.first[left] - window))
        return until

    def needed(self, epoch: int) -> int:
        """Most bytes that two windows in succession touch: the smallest cache that never loads a shard twice."""
        stops = self.stops(epoch)
        if not len(stops.shard):
            return 0
        size = self.shard_bytes[stops.shard]
        times = np.concatenate((stops.first - 1, stops.last + 1))
        order = np.argsort(times, kind="stable")
        change = np.concatenate((size, -size))[order]
        ends = np.flatnonzero(np.diff(times[order], append=np.iinfo(np.int64).max))
        return int(min(np.cumsum(change)[ends].max(), self.shard_bytes.sum()))


def _stops(order: Line, node: int, nodes: int, epoch: int) -> Stops:
    walk = order.walk(epoch)
    ends = np.append(walk.starts[1:], order.samples)
    step = gcd(nodes, order.lanes)
    # positions p of this node have p % nodes == node, and a place is p - epoch * N
    lanes = range((node - epoch * order.samples) % step, order.lanes, step)
    uneven = int(np.ptp(walk.lane_sizes)) > 1
    parts = []
    for begin, size in zip(walk.lane_starts[lanes].tolist(), walk.lane_sizes[lanes].tolist(), strict=True):
        if not size:
            continue  # a small source of a mixture need not reach every lane
        places = np.flatnonzero((ends > begin) & (walk.starts < begin + size) & (ends > walk.starts))
        first = np.maximum(walk.starts[places] - begin, 0) // order.window
        last = (np.minimum(ends[places], begin + size) - 1 - begin) // order.window
        if uneven:
            first, last = _on_the_mean(order, first, last, size)
        parts.append(np.stack((first, last, walk.shards[places])))
    table = np.concatenate([np.empty((3, 0), dtype=np.int64), *parts], axis=1)
    table = table[:, np.argsort(table[0], kind="stable")]
    longest = -(-order.samples // order.lanes) if uneven else int(walk.lane_sizes.max())
    return Stops(table[2], table[0], table[1], -(-longest // order.window))


def _on_the_mean(order: Line, first: Integers, last: Integers, size: int) -> tuple[Integers, Integers]:
    """Windows of a lane of ``size`` as windows of the mean lane, by which a mixture's positions are told.

    Its lanes differ by some percent and end together. A lane may be some samples ahead or behind: so a window early
    and a window late.
    """
    opened, closed = first * order.window, np.minimum((last + 1) * order.window, size) - 1
    scale = order.samples / (size * order.lanes * order.window)
    final = (order.samples - 1) // (order.lanes * order.window)
    early, late = (opened * scale).astype(np.int64) - 1, (closed * scale).astype(np.int64) + 1
    return np.maximum(0, early), np.minimum(final, late)
