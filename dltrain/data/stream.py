"""Samples one after another, in the order of data: for those who need neither arrays nor batches.

dataset = open_dataset("s3://bucket/digits/train")
for sample in stream(dataset, Order(dataset.shard_sizes, seed=0), stop=10_000):
    print(sample.key, len(sample.fields["png"]))
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from dltrain.data.order import Integers, SampleOrder, share
from dltrain.data.reader import Dataset, Streamed
from dltrain.data.sample import Sample


def stream(
    dataset: Dataset,
    order: SampleOrder,
    *,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    node: int = 0,
    nodes: int = 1,
    read: int = 64,
) -> Iterator[Sample]:
    """The samples at positions ``[start, stop)`` that are data rank ``rank``'s, without end where ``stop`` is None.

    ``read`` of them are read at a time. ``node`` of ``nodes`` is where the rank runs, for data that are fetched ahead.
    Raises :class:`~dltrain.data.sample.BadSample` for one that is damaged.
    """
    places = Places(order)
    if isinstance(dataset, Streamed):
        dataset.follow(order, node, nodes)
    try:
        for first in count(start, read * ranks):
            last = first + read * ranks if stop is None else min(first + read * ranks, stop)
            if first >= last:
                return
            if isinstance(dataset, Streamed):
                dataset.advance(first)
            mine = share(first, last, rank, ranks)
            if len(mine):
                yield from dataset.read(*places.locate(mine))
    finally:
        if isinstance(dataset, Streamed):
            dataset.rest()


class Places:
    """Where the samples at positions stand, worked out for thousands at a time: a tenth of the cost of 64 at a time.

    Whoever asks goes on from position to position in equal strides; anything else is answered too, at full cost. The
    block begins small and grows, up to an epoch: a first batch does not wait for thousands.
    """

    BLOCK = 4096

    def __init__(self, order: SampleOrder) -> None:
        self._order = order
        self._first, self._stride, self._known = 0, 1, 0
        self._shards: Integers = np.empty(0, np.int64)
        self._indices: Integers = np.empty(0, np.int64)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard, and index within it, of the samples at ``positions``, int64 [n]; as :class:`SampleOrder` has it."""
        if len(positions) < 2:
            return self._order.locate(positions)
        places = self._places(positions)
        if places is None:
            self._work_ahead(positions)
            places = self._places(positions)
        if places is None:
            return self._order.locate(positions)
        return self._shards[places], self._indices[places]

    def _places(self, positions: Integers) -> Integers | None:
        """Where in the block these stand, or None where one of them does not."""
        places, beside = np.divmod(positions - self._first, self._stride)
        inside = places.min() >= 0 and places.max() < self._known and not beside.any()
        return places if inside else None

    def _work_ahead(self, positions: Integers) -> None:
        first, end = int(positions[0]), self._first + self._known * self._stride
        goes_on = self._first < first <= end
        self._first, self._stride = first, max(1, int(positions[1]) - first)
        most = min(self.BLOCK, self._order.samples // self._stride)
        self._known = max(len(positions), min(4 * self._known, most) if goes_on else 0)
        ahead = self._first + self._stride * np.arange(self._known, dtype=np.int64)
        self._shards, self._indices = self._order.locate(ahead)
