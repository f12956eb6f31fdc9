"""What a node's cache loads over a run: the routes of all epochs, walked window by window.

The rules are those of :mod:`dltrain.data.cached` and :mod:`dltrain.data.prefetch`, for a network that keeps up: the
shards of the current and the next window, and those behind them as far as the depth goes, are loaded in the order of
their first use; where room is short the furthest next use leaves first, never for what is needed later than itself, and
what the coming epoch does not use counts as furthest of all.

    lines = Timeline.of(order, shards=1000, nodes=16, epochs=10)
    loaded = lines[0].loads(shard_bytes, cache_bytes=100 << 30, ahead_bytes=1 << 30)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush
from math import gcd

import numpy as np
from numpy.typing import NDArray

from dltrain.data.order import Integers, Order
from dltrain.data.route import Route, Stops

Flags = NDArray[np.bool_]

_NEVER = np.iinfo(np.int64).max
"""As a window: beyond the end of the coming epoch, which is as far as the cache looks."""


@dataclass(frozen=True)
class Timeline:
    """A node's stops over several epochs, by first use; windows are counted from the beginning of the run.

    A shard that two lanes use without a pause stands here once, one that they use at different times twice.
    """

    shard: Integers
    epoch: Integers
    first: Integers
    """First window that uses the shard."""
    last: Integers
    """Last window that does."""
    begins: Integers
    """First window of each epoch, and the window behind the last: [epochs + 1]."""

    @classmethod
    def of(cls, order: Order, shards: int, nodes: int, epochs: int) -> list[Timeline]:
        """The stops of a data set's first ``epochs`` epochs on ``nodes`` nodes.

        One of each kind: node i reads the lanes of the i-th timeline modulo their number.
        """
        routes = [
            Route(order, np.zeros(shards, dtype=np.int64), node, nodes) for node in range(gcd(nodes, order.lanes))
        ]
        # all nodes of an epoch before the next, while the order has its line of shards
        stops = [[route.stops(epoch) for route in routes] for epoch in range(epochs)]
        return [cls._chained(list(epoch)) for epoch in zip(*stops, strict=True)]

    @classmethod
    def _chained(cls, stops: list[Stops]) -> Timeline:
        begins = np.cumsum([0, *(stop.windows for stop in stops)])
        counts = [len(stop.shard) for stop in stops]
        before = np.repeat(begins[:-1], counts)
        first, last = (np.concatenate([getattr(s, name) for s in stops]) + before for name in ("first", "last"))
        shard, epoch = np.concatenate([stop.shard for stop in stops]), np.repeat(np.arange(len(stops)), counts)
        shard, epoch, first, last = _joined(shard, epoch, first, last)
        return cls(shard, epoch, first, last, begins)

    def first_loads(self) -> Flags:
        """The first stop at each shard: what an unlimited cache loads, [stops]."""
        found = np.zeros(len(self.shard), dtype=np.bool_)
        found[np.unique(self.shard, return_index=True)[1]] = True
        return found

    def loads(self, sizes: Integers, cache_bytes: int, ahead_bytes: int) -> Flags:
        """Which stops download their shard, [stops]. ``sizes`` are by shard; ``cache_bytes`` 0 is no limit."""
        fresh = self.first_loads()
        if not cache_bytes or sizes[self.shard[fresh]].sum() <= cache_bytes:
            return fresh
        return _Walk(self, sizes, cache_bytes).run(self._due(sizes, ahead_bytes))

    def peak(self, sizes: Integers, epoch: int) -> int:
        """Most bytes that are to be used again within the epoch, or now, or in the next window: what a cache must hold
        that never loads a shard twice in it."""
        mine = self.epoch == epoch
        shards, which = np.unique(self.shard[mine], return_inverse=True)
        begin, end = np.full(len(shards), _NEVER), np.zeros(len(shards), dtype=np.int64)
        np.minimum.at(begin, which, self.first[mine] - 1)
        np.maximum.at(end, which, self.last[mine] + 1)
        return int(crowd(np.maximum(begin, self.begins[epoch]), end, sizes[shards])[0])

    def _due(self, sizes: Integers, ahead_bytes: int) -> Integers:
        """The window in which each stop comes within the depth, [stops]: one before its first use at the latest."""
        before = np.cumsum(sizes[self.shard]) - sizes[self.shard]
        by_end = np.argsort(self.last, kind="stable")
        over = np.cumsum(sizes[self.shard[by_end]])  # bytes behind the reader when each stop has ended
        # the bytes on the way to a stop are those before it less those behind the reader
        ends = np.searchsorted(over, before - ahead_bytes, side="right")
        behind = np.append(self.last[by_end] + 1, self.begins[-1])[ends]
        due = np.where(before < ahead_bytes, 0, np.minimum(behind, self.first - 1))
        return np.maximum.accumulate(np.maximum(due, 0))


class _Walk:
    """A cache of ``budget`` bytes on its way along a timeline."""

    def __init__(self, line: Timeline, sizes: Integers, budget: int) -> None:
        self._budget, self._used = budget, 0
        self._begins, self._sizes = line.begins.tolist(), sizes.tolist()
        self._shard, self._first = line.shard.tolist(), line.first.tolist()
        self._next, self._epoch = _next_stops(line.shard).tolist(), [*line.epoch.tolist(), len(line.begins)]
        by_end = np.argsort(line.last, kind="stable")
        self._ending, self._ends = by_end.tolist(), [*line.last[by_end].tolist(), _NEVER]
        self._over = self._window = self._now = 0  # stops that have ended, the reader's window and epoch
        self._until: dict[int, int] = {}  # next use of each shard in the cache
        self._waiting: list[tuple[int, int]] = []  # those not in use, the furthest first; some entries are out of date
        self._idle: OrderedDict[int, int] = OrderedDict()  # those with no use in sight, and their next stop

    def run(self, due: Integers) -> Flags:
        loaded = np.zeros(len(self._shard), dtype=np.bool_)
        for stop, (shard, window) in enumerate(zip(self._shard, due.tolist(), strict=True)):
            if window > self._window:
                self._advance(window)
            if shard not in self._until:
                size = self._sizes[shard]
                while self._used + size > self._budget and self._until:
                    self._make_room(self._first[stop])
                self._used += size
                self._until[shard] = self._first[stop]
                loaded[stop] = True
        return loaded

    def _make_room(self, needed: int) -> None:
        """Evict what is needed later, or wait for the reader; when the shard itself is needed evict in any case."""
        if self._idle:
            self._evict(next(iter(self._idle)))
            return
        while self._waiting and self._until.get(self._waiting[0][1]) != -self._waiting[0][0]:
            heappop(self._waiting)
        furthest = -self._waiting[0][0] if self._waiting else -1
        if furthest > max(self._window + 1, needed):
            self._evict(heappop(self._waiting)[1])
        elif self._window < needed:
            self._advance(min(needed, self._ends[self._over] + 1))
        else:
            self._evict(max(self._until, key=lambda shard: self._until[shard]))

    def _evict(self, shard: int) -> None:
        del self._until[shard]
        self._idle.pop(shard, None)
        self._used -= self._sizes[shard]

    def _advance(self, window: int) -> None:
        """The reader enters a window: shards whose stops have ended wait for their next."""
        self._window = window
        while window >= self._begins[self._now + 1]:
            self._now += 1
            self._look_further()
        while self._ends[self._over] < window:
            stop = self._ending[self._over]
            self._over += 1
            if self._shard[stop] in self._until:
                self._expect(self._shard[stop], self._next[stop])

    def _expect(self, shard: int, stop: int) -> None:
        if self._epoch[stop] > self._now + 1:
            self._idle[shard], self._until[shard] = stop, _NEVER
            return
        self._until[shard] = self._first[stop]
        heappush(self._waiting, (-self._first[stop], shard))

    def _look_further(self) -> None:
        """Another epoch comes into sight."""
        for shard, stop in list(self._idle.items()):
            if self._epoch[stop] <= self._now + 1:
                del self._idle[shard]
                self._expect(shard, stop)


def crowd(begin: Integers, end: Integers, amount: Integers) -> tuple[int, float]:
    """Most of what is there at once, and its mean over time; ``amount[i]`` is there in windows [begin, end)."""
    times = np.concatenate((begin, end))
    order = np.argsort(times, kind="stable")
    level = np.cumsum(np.concatenate((amount, -amount))[order])
    settled = np.flatnonzero(np.diff(times[order], append=_NEVER))
    span = int(end.max() - begin.min())
    return int(level[settled].max()), float(((end - begin) * amount).sum() / span)


def _next_stops(shard: Integers) -> Integers:
    """For each stop the next one at the same shard, or -1."""
    order = np.argsort(shard, kind="stable")
    following = np.full(len(shard), -1, dtype=np.int64)
    same = shard[order[1:]] == shard[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following


def _joined(
    shard: Integers, epoch: Integers, first: Integers, last: Integers
) -> tuple[Integers, Integers, Integers, Integers]:
    """Stops at one shard in one epoch that overlap or follow one another, as one; by first use."""
    order = np.lexsort((first, shard, epoch))
    shard, epoch, first, last = (array[order] for array in (shard, epoch, first, last))
    other = np.concatenate(([True], (shard[1:] != shard[:-1]) | (epoch[1:] != epoch[:-1])))
    # within a shard, the furthest window reached so far; groups are kept apart by adding to each more than any window
    apart = np.cumsum(other) * (int(last.max()) + 2)
    reached = np.maximum.accumulate(last + apart) - apart
    opens = other | np.concatenate(([True], first[1:] > reached[:-1] + 1))
    starts = np.flatnonzero(opens)
    closes = np.append(starts[1:], len(shard)) - 1
    first, last = first[starts], reached[closes]
    by_use = np.argsort(first, kind="stable")
    starts = starts[by_use]
    return shard[starts], epoch[starts], first[by_use], last[by_use]
