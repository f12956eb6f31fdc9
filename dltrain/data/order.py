"""The order of data: pure functions of integers.

The position in the data is one integer, ``epoch * N + place``. Everything else follows by arithmetic: which sample
stands there, which rank takes it, where the next step begins. Nothing of size N is built, and no library's random
generator is asked, for their streams change between versions.

1. The shards are permuted under a key of (seed, epoch) and laid end to end as a line of N samples.
2. The line is cut into ``lanes`` equal pieces; place p is sample ``p // lanes`` of lane ``p % lanes``.
3. Inside a lane, windows of a fixed number of samples are permuted.

A step takes positions ``[p, p + G)`` and data rank r of R those with ``position % R == r``, so that any number of
ranks continues the same sequence, and a node whose ranks share a residue reads its own lanes alone.

    order = Order(shard_sizes=(1000, 1000, 437), seed=0)
    shard, index = order.locate(np.arange(64))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6
_FEW = 8
_SHARDS, _WINDOWS, _SAMPLES, _STEPS = 1, 2, 3, 4


def mix(value: int) -> int:
    """Scramble 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def derive(*parts: int) -> int:
    """A 64-bit key from a sequence of integers; each prefix leads to keys of its own."""
    key = 0
    for part in parts:
        key = mix((key + _GOLDEN & _MASK) ^ (part & _MASK))
    return key


def sample_key(seed: int, position: int) -> int:
    """Key of all randomness in decoding and augmenting the sample at ``position``."""
    return derive(seed, _SAMPLES, position)


def step_key(seed: int, step: int, rank: int) -> int:
    """Key of the randomness (dropout) of one data rank in one optimizer step."""
    return derive(seed, _STEPS, step, rank)


def scramble(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """:func:`mix` of every element."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(index: Integers, size: Integers, key: NDArray[np.uint64]) -> Integers:
    """Where a keyed permutation of ``[0, size)`` sends ``index``.

    A balanced Feistel network over the next power of four, walked along its cycle until the result lies below ``size``
    (Black and Rogaway, 2002). The three arrays have one shape [n] or broadcast to it; int64, int64, uint64.
    """
    index, size, key = (array.copy() for array in np.broadcast_arrays(index, size, key))
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)  # exact where log2 may differ between systems
    half = np.maximum(np.uint64(1), (bits + np.uint64(1)) // np.uint64(2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside) > _FEW:
        walked = _feistel(result[outside], half[outside], mask[outside], key[outside])
        result[outside] = walked
        outside = outside[walked >= size[outside].astype(np.uint64)]
    for place in outside.tolist():
        result[place] = _walk(*(int(array[place]) for array in (result, size, half, mask, key)))
    return result.astype(np.int64)


def _walk(value: int, size: int, half: int, mask: int, key: int) -> int:
    """The same for one number: quicker than arrays of a few, which the end of every walk leaves."""
    while True:
        left, right = value >> half, value & mask
        for turn in range(1, _ROUNDS + 1):
            left, right = right, left ^ (mix(right ^ (key + turn * _GOLDEN & _MASK)) & mask)
        value = (left << half) | right
        if value < size:
            return value


def _feistel(
    value: NDArray[np.uint64], half: NDArray[np.uint64], mask: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = value >> half, value & mask
    for turn in range(1, _ROUNDS + 1):
        turned = scramble(right ^ (key + np.uint64(turn * _GOLDEN & _MASK)))
        left, right = right, left ^ (turned & mask)
    return (left << half) | right


def share(start: int, stop: int, rank: int, ranks: int) -> Integers:
    """Positions in ``[start, stop)`` that belong to a data rank: those equal to ``rank`` modulo ``ranks``."""
    return np.arange(start + (rank - start) % ranks, stop, ranks, dtype=np.int64)


def step_span(position: int, samples: int, global_batch_size: int, tail: str) -> tuple[int, int]:
    """Positions ``[start, stop)`` of the step that begins at ``position``, in an endless sequence of epochs.

    ``carry`` runs on into the next epoch; ``drop`` moves past a tail too small for a whole batch; ``pad`` ends the step
    with the epoch (the loader fills it up with samples of weight 0, which have no position).
    """
    left = samples - position % samples
    if tail == "carry" or left >= global_batch_size:
        return position, position + global_batch_size
    if tail == "drop":
        return position + left, position + left + global_batch_size
    return position, position + left


def steps_between(position: int, end: int, samples: int, global_batch_size: int, tail: str) -> int:
    """Steps from ``position`` until ``end`` is reached, both in samples over all epochs, under a policy of the tail."""
    if end <= position:
        return 0
    if tail == "carry":
        return -(-(end - position) // global_batch_size)

    def within(length: int, room: int) -> int:
        """Steps of ``length`` samples where ``room`` are left in the epoch."""
        whole = room // global_batch_size if tail == "drop" else -(-room // global_batch_size)
        return min(-(-length // global_batch_size), whole)

    (epoch, place), (last, rest) = divmod(position, samples), divmod(end, samples)
    if epoch == last:
        return within(rest - place, samples - place)
    return (
        within(samples - place, samples - place) + (last - epoch - 1) * within(samples, samples) + within(rest, samples)
    )


class SampleOrder(Protocol):
    """What a loader asks of an endless sequence of samples."""

    @property
    def seed(self) -> int:
        """Seed of the order, and of what is random in decoding and augmenting."""
        ...

    @property
    def samples(self) -> int:
        """Samples of one epoch: the unit of lengths in ``ep``."""
        ...

    @property
    def lanes(self) -> int:
        """Places between two neighbours of one lane."""
        ...

    @property
    def tails(self) -> tuple[str, ...]:
        """Policies of an epoch's last batch that make sense for it (see :func:`step_span`)."""
        ...

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard, and index within it, of the samples at ``positions`` (int64 [n]); two arrays of the same shape."""
        ...

    def state(self) -> dict[str, Any]:
        """What a cursor must find unchanged, as small JSON; :data:`SETTINGS` names those the user sets."""
        ...


SETTINGS = {
    "seed": "run.seed",
    "lanes": "data.lanes",
    "window": "data.window",
    "shuffle": "shuffle",
    "weights": "data.sources.weight",
}
"""Entries of an order's state, by the names of the settings they come from."""


@dataclass(frozen=True)
class Pass:
    """One walk over all samples of a data set: its shards laid end to end as a line, and the line cut into lanes."""

    key: int
    """Of the permutations inside windows."""
    shards: Integers
    """In the order of the line."""
    starts: Integers
    """Where each of them begins on the line."""
    lane_starts: Integers
    """Where each lane begins on the line, [lanes]."""
    lane_sizes: Integers
    lane_before: Integers
    """Samples of each lane that earlier passes took, [lanes]."""


def lay_out(
    sizes: Integers, seed: int, epoch: int, lane_sizes: Integers, lane_before: Integers, first_shard: int = 0
) -> Pass:
    """The pass over shards of ``sizes`` in ``epoch``; epoch -1 keeps the shards in the manifest's order.

    Shards are numbered from ``first_shard``.
    """
    shards = np.arange(len(sizes), dtype=np.int64)
    if epoch >= 0:
        key = np.full(len(sizes), derive(seed, _SHARDS, epoch), dtype=np.uint64)
        shards = permute(shards, np.full(len(sizes), len(sizes), dtype=np.int64), key)
    ordered = sizes[shards]
    starts, lane_starts = np.cumsum(ordered) - ordered, np.cumsum(lane_sizes) - lane_sizes
    return Pass(derive(seed, _WINDOWS, epoch), shards + first_shard, starts, lane_starts, lane_sizes, lane_before)


class Passes:
    """Some passes on one line, each beginning where the one before it ends, so that one search finds samples of all."""

    def __init__(self, parts: Sequence[Pass]) -> None:
        sizes = [int(part.lane_sizes.sum()) for part in parts]
        begins = np.cumsum([0, *sizes[:-1]])
        self._keys = np.array([part.key for part in parts], dtype=np.uint64)
        self._shards = np.concatenate([part.shards for part in parts])
        self._starts = np.concatenate([part.starts + begin for part, begin in zip(parts, begins, strict=True)])
        # [passes, lanes] each
        self._lane_starts = np.stack([part.lane_starts for part in parts]) + begins[:, None]
        self._lane_sizes = np.stack([part.lane_sizes for part in parts])
        self._lane_before = np.stack([part.lane_before for part in parts])

    def find(self, which: Integers, lane: Integers, taken: Integers, window: int) -> tuple[Integers, Integers]:
        """Shard and index of samples, each in pass ``which`` when ``taken`` of its ``lane`` went before it.

        ``window`` samples are permuted together; 0 permutes none. All arrays are int64 [n].
        """
        start, size = self._lane_starts[which, lane], self._lane_sizes[which, lane]
        place = taken - self._lane_before[which, lane]
        line = start + (_shuffle_windows(place, size, lane, window, self._keys[which]) if window else place)
        at = np.searchsorted(self._starts, line, side="right") - 1
        return self._shards[at], line - self._starts[at]


class Walks:
    """Passes by number, made when they are asked for; the last ``keep`` stay, each as large as the list of shards."""

    def __init__(self, make: Callable[[int], Pass], keep: int) -> None:
        self.one = lru_cache(maxsize=keep)(make)
        self._some = lru_cache(maxsize=2)(lambda numbers: Passes([self.one(number) for number in numbers]))

    def some(self, numbers: tuple[int, ...]) -> Passes:
        """The passes of these numbers together."""
        return self._some(numbers)


def _shuffle_windows(
    place: Integers, lane_size: Integers, lane: Integers, window: int, key: NDArray[np.uint64]
) -> Integers:
    """Places in their lanes, permuted inside windows of ``window`` samples."""
    number, inside = np.divmod(place, window)
    size = np.minimum(window, lane_size - number * window)
    key = scramble(scramble(key ^ lane.astype(np.uint64)) + number.astype(np.uint64))
    return number * window + permute(inside, size, key)


@dataclass(frozen=True)
class Order:
    """The endless sequence of samples of one data set under one seed.

    ``shard_sizes`` are the samples of each shard in the order of the manifest. Without ``shuffle`` neither shards nor
    windows are permuted; lanes remain, so that reads stay local to a node.
    """

    shard_sizes: tuple[int, ...]
    seed: int = 0
    lanes: int = 16
    window: int = 4096
    shuffle: bool = True

    @property
    def tails(self) -> tuple[str, ...]:
        return ("carry", "drop", "pad")

    @cached_property
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return sum(self.shard_sizes)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard, and index within it, of the samples at ``positions`` (int64 [n]); two arrays of the same shape."""
        epochs, places = np.divmod(positions, self.samples)
        taken, lane = np.divmod(places, self.lanes)
        if not self.shuffle:
            return self._walks.some((-1,)).find(np.zeros_like(lane), lane, taken, 0)
        numbers, which = distinct(epochs)
        return self._walks.some(numbers).find(which, lane, taken, self.window)

    def walk(self, epoch: int) -> Pass:
        """The epoch's line of shards and its lanes."""
        return self._walks.one(epoch if self.shuffle else -1)

    def state(self) -> dict[str, Any]:
        """What a cursor must find unchanged."""
        mine = {"seed": self.seed, "lanes": self.lanes, "window": self.window, "shuffle": self.shuffle}
        return {"samples": self.samples, **mine}

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)

    @cached_property
    def _walks(self) -> Walks:
        sizes, seed = np.asarray(self.shard_sizes, dtype=np.int64), self.seed
        short, longer = divmod(self.samples, self.lanes)
        lane_sizes = short + (np.arange(self.lanes, dtype=np.int64) < longer)
        nothing = np.zeros_like(lane_sizes)
        return Walks(lambda epoch: lay_out(sizes, seed, epoch, lane_sizes, nothing), keep=4)


def distinct(values: Integers) -> tuple[tuple[int, ...], Integers]:
    """The different values, ascending, and for each element the number of its own."""
    if len(values) and (values == values[0]).all():
        return (int(values[0]),), np.zeros_like(values)
    numbers, which = np.unique(values, return_inverse=True)
    return tuple(numbers.tolist()), which


def fields_of(instance: Any) -> dict[str, Any]:
    """A dataclass's own fields: what is pickled, without what it has worked out."""
    return {field.name: getattr(instance, field.name) for field in fields(instance)}
