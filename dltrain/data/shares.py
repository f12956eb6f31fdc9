"""Shares of several sources as a sequence of choices: pure functions of integers.

The sequence repeats, so one turn of it is a table, and any position is found by arithmetic. In every prefix the samples
of each source are within one of its share (Tijdeman, "The chairman assignment problem", 1980).

    table = make_table(weights=(3, 1), lanes=16, key=0)
    table.source[:8]  # six times 0 and twice 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from dltrain.data.order import Integers, derive, scramble
from dltrain.errors import UserError

PERIOD = 65_536
"""Most samples after which the weights may repeat."""

TABLE = 1 << 20
"""Most positions after which weights and lanes together may repeat; 16 lanes always fit."""

_STIRRED = 4096  # positions at least before the choice repeats, so that it does not keep step with the ranks
_SWEEPS = 32


@dataclass(frozen=True)
class Table:
    """Which source each position takes, over the positions after which weights and lanes repeat."""

    source: Integers
    taken: Integers
    """Samples of the same source at earlier positions of the table."""
    taken_of_lane: Integers
    """Samples of the same source and lane at earlier positions of the table."""
    per_turn: Integers
    """Samples of each source in the whole table, [sources]."""
    per_lane: Integers
    """The same by lane, [sources, lanes]."""

    def lanes_of(self, source: int, count: int) -> Integers:
        """Samples of each lane among the first ``count`` of a source, [lanes]."""
        turns, rest = divmod(count, int(self.per_turn[source]))
        slots = np.flatnonzero(self.source == source)[:rest]
        lanes = self.per_lane.shape[1]
        return turns * self.per_lane[source] + np.bincount(slots % lanes, minlength=lanes)


@lru_cache(maxsize=4)
def make_table(weights: tuple[int, ...], lanes: int, key: int) -> Table:
    """The table of ``weights`` (without a common divisor), stirred under ``key``."""
    period = sum(weights)
    base = math.lcm(period, lanes)
    repeats = base // period * -(-_STIRRED // base)
    stirred = next(n for n in range(1, repeats + 1) if repeats % n == 0 and n * period >= _STIRRED)
    source = np.tile(stir(np.tile(earliest_deadline_first(weights), stirred), weights, key), repeats // stirred)
    length = len(source)
    cell = source * lanes + np.arange(length) % lanes
    per_lane = np.bincount(cell, minlength=len(weights) * lanes).reshape(len(weights), lanes)
    return Table(source, _earlier(source), _earlier(cell), per_lane.sum(1), per_lane)


def earliest_deadline_first(weights: tuple[int, ...]) -> Integers:
    """The source of each position of one period W = sum(weights): int64 [W].

    The k-th sample of a source of weight w may come once ``(k - 1) * W / w`` positions are over and must have come
    when ``k * W / w`` are, rounded up. Whoever is due first goes first; then none is late, and so every prefix is
    within one of all shares (Tijdeman 1980; Baruah et al. 1996).
    """
    period = sum(weights)
    done, chosen = [0] * len(weights), np.empty(period, dtype=np.int64)
    waiting = [(0, source) for source in range(len(weights))]
    ready: list[tuple[int, int]] = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            source = heappop(waiting)[1]
            heappush(ready, (-(-(done[source] + 1) * period // weights[source]), source))
        source = heappop(ready)[1]
        done[source] += 1
        chosen[position] = source
        heappush(waiting, (done[source] * period // weights[source], source))
    return chosen


def stir(chosen: Integers, weights: tuple[int, ...], key: int) -> Integers:
    """``chosen`` with neighbours swapped at random, wherever both sources stay within one of their share.

    Swapping positions t and t + 1 changes one prefix alone: its first t + 1 positions have one sample less of the one
    source, which must be ahead of its share there, and one more of the other, which must be behind.
    """
    source, taken = chosen.copy(), _earlier(chosen)
    period, weight = sum(weights), np.array(weights, dtype=np.int64)
    for sweep in range(_SWEEPS):
        left = np.arange(sweep % 2, len(source) - 1, 2)
        ahead = (taken[left] + 1) * period > (left + 1) * weight[source[left]]
        behind = taken[left + 1] * period < (left + 1) * weight[source[left + 1]]
        coin = scramble(np.uint64(derive(key, sweep)) + left.astype(np.uint64)) & np.uint64(1)
        left = left[ahead & behind & (coin == 1)]
        for array in (source, taken):
            array[left], array[left + 1] = array[left + 1], array[left]
    return source


def _earlier(values: Integers) -> Integers:
    """For each element, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    result = np.empty_like(values)
    result[order] = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    return result


def refuse_unusable(weights: tuple[int, ...], lanes: int) -> None:
    """Raises :class:`UserError` for weights below 1, and for those whose table would be too long."""
    if not all(weight > 0 for weight in weights):
        raise UserError(
            f"the weights of data.sources are {_ratio(weights)}; give every source a weight of 1 or more, "
            "or none of them, for shares by size"
        )
    period = sum(reduced(weights))
    if period > PERIOD:
        raise UserError(
            f"the weights of data.sources, {_ratio(weights)}, repeat only after {period} samples, and "
            f"{PERIOD} are the most; round them, for example to {_ratio(_rounded(weights))}"
        )
    both = math.lcm(period, lanes)
    if both > TABLE:
        raise UserError(
            f"data.lanes {lanes} and weights that repeat after {period} samples repeat together only after {both}, "
            f"and {TABLE} are the most; set data.lanes to 16, or round the weights"
        )


def weights_by_size(shard_sizes: Sequence[tuple[int, ...]], repeats: Sequence[int]) -> tuple[int, ...]:
    """Weights by which one epoch of the mixture passes ``repeat`` times over each source.

    Exact where they repeat after at most 65,536 samples, else rounded to parts of 65,536.
    """
    sizes = [sum(sizes) * repeat for sizes, repeat in zip(shard_sizes, repeats, strict=True)]
    if sum(reduced(sizes)) <= PERIOD:
        return reduced(sizes)
    smallest = min(sizes)
    if smallest * PERIOD < sum(sizes):
        raise UserError(
            f"the smallest of data.sources has {smallest} of {sum(sizes)} samples, less than one in {PERIOD}; "
            "give each source a weight, or the smallest a higher repeat"
        )
    return _rounded(sizes)


def _rounded(weights: Sequence[int]) -> tuple[int, ...]:
    """The nearest weights, each 1 or more, that sum to 65,536: the largest remainders are rounded up."""
    total = sum(weights)
    low = [max(1, weight * PERIOD // total) for weight in weights]
    spare = PERIOD - sum(low)  # below 0 where many were raised to 1: the largest pays
    low[low.index(max(low))] += min(0, spare)
    by_remainder = sorted(range(len(weights)), key=lambda place: (-(weights[place] * PERIOD % total), place))
    for place in by_remainder[: max(0, spare)]:
        low[place] += 1
    return reduced(low)


def reduced(weights: Sequence[int]) -> tuple[int, ...]:
    """The weights without their common divisor."""
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def _ratio(weights: Sequence[int]) -> str:
    return ":".join(map(str, weights))
