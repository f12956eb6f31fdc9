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

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6
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


def _mix_array(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
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
    while len(outside):
        walked = _feistel(result[outside], half[outside], mask[outside], key[outside])
        result[outside] = walked
        outside = outside[walked >= size[outside].astype(np.uint64)]
    return result.astype(np.int64)


def _feistel(
    value: NDArray[np.uint64], half: NDArray[np.uint64], mask: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = value >> half, value & mask
    for turn in range(1, _ROUNDS + 1):
        turned = _mix_array(right ^ (key + np.uint64(turn * _GOLDEN & _MASK)))
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
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return _total(self.shard_sizes)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard, and index within it, of the samples at ``positions`` (int64 [n]); two arrays of the same shape."""
        shards = np.empty_like(positions)
        indices = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.samples)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            line = self._line(int(epoch), places[inside])
            shards[inside], indices[inside] = self._from_line(int(epoch), line)
        return shards, indices

    def _line(self, epoch: int, places: Integers) -> Integers:
        """Index on the line of the epoch's shards."""
        short, longer = divmod(self.samples, self.lanes)
        place, lane = np.divmod(places, self.lanes)
        lane_start = lane * short + np.minimum(lane, longer)
        if not self.shuffle:
            return lane_start + place
        lane_size = short + (lane < longer)
        window, inside = np.divmod(place, self.window)
        window_size = np.minimum(self.window, lane_size - window * self.window)
        epoch_key = np.uint64(derive(self.seed, _WINDOWS, epoch))
        key = _mix_array(_mix_array(epoch_key ^ lane.astype(np.uint64)) + window.astype(np.uint64))
        return lane_start + window * self.window + permute(inside, window_size, key)

    def _from_line(self, epoch: int, line: Integers) -> tuple[Integers, Integers]:
        shards, starts = _shard_line(self.shard_sizes, self.seed, epoch if self.shuffle else -1)
        place = np.searchsorted(starts, line, side="right") - 1
        return shards[place], line - starts[place]


@lru_cache(maxsize=64)
def _total(sizes: tuple[int, ...]) -> int:
    return sum(sizes)


@lru_cache(maxsize=8)
def _shard_line(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[Integers, Integers]:
    """The epoch's shards in order, and where each starts on the line; epoch -1 keeps the manifest's order."""
    shards = np.arange(len(sizes), dtype=np.int64)
    if epoch >= 0:
        key = np.full(len(sizes), derive(seed, _SHARDS, epoch), dtype=np.uint64)
        shards = permute(shards, np.full(len(sizes), len(sizes), dtype=np.int64), key)
    ordered = np.asarray(sizes, dtype=np.int64)[shards]
    return shards, np.cumsum(ordered) - ordered
