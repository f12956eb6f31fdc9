"""Several data sets as one endless sequence, mixed by weight.

Which source a position takes is written in a table that repeats, so it is found by arithmetic, like everything in
:mod:`dltrain.data.order`: any number of ranks and any restart continues the same sequence. In every prefix of it the
samples of each source are within one of its share (Tijdeman, "The chairman assignment problem", 1980).

    sources = (Source("s3://bucket/photos", weight=3), Source("s3://bucket/sketches", weight=1))
    dataset = MixedDataset(sources, [open_dataset(source.url) for source in sources])
    loader = Loader(dataset, dataset.order(seed=0), task.sample, global_batch_size=64)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from dltrain.data.order import Integers, Pass, SampleOrder, Walks, derive, distinct, fields_of, lay_out, permute
from dltrain.data.reader import Dataset, Streamed
from dltrain.data.sample import Sample
from dltrain.data.shares import Table, make_table, reduced, refuse_unusable, weights_by_size
from dltrain.errors import UserError

_SOURCES, _CHOICE, _SUBSET = 5, 6, 7


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    ``weight`` is its share of the samples beside the others' (mosaicml/streaming's ``proportion``). Where every weight
    is 0, shares follow the sources' sizes, so that an epoch of the mixture passes over each once (or ``repeat`` times).

    ``limit`` keeps that many samples of it (``choose``, with a fixed subset): whole shards, chosen by a fixed key and
    the last one cut, the same in every epoch and under every seed; 0 keeps all. ``repeat`` counts its samples that many
    times over in the mixture's epoch (``repeat``). The passes follow one another, each of them shuffled anew, so no
    sample comes again before all others of its source have come.
    """

    url: str
    weight: int = 0
    limit: int = 0
    repeat: int = 1

    def __post_init__(self) -> None:
        for name, least in (("weight", 0), ("limit", 0), ("repeat", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(f"the {name} of source {self.url} is {value!r}; give a whole number, {least} or more")


class MixedDataset:
    """The samples of all sources, their shards numbered one source after the other.

    ``facts`` are the first source's, and under ``"sources"`` each source's own by its URL.
    """

    def __init__(self, sources: Sequence[Source], datasets: Sequence[Dataset]) -> None:
        _refuse_twins(sources)
        self.sources = tuple(sources)
        self._datasets = tuple(datasets)
        pairs = list(zip(self.sources, self._datasets, strict=True))
        self._sizes = tuple(subset(tuple(dataset.shard_sizes), source.limit) for source, dataset in pairs)
        for source, sizes in zip(self.sources, self._sizes, strict=True):
            if not sum(sizes):
                raise UserError(f"source {source.url} has no samples; leave it out of data.sources")
        parts = [[dataset.fingerprint, source.limit] for source, dataset in pairs]
        self._fingerprint = "+".join(hashlib.sha256(json.dumps(part).encode()).hexdigest()[:8] for part in parts)
        self._counts: Callable[[int], list[int]] | None = None
        self._ends = np.cumsum([len(sizes) for sizes in self._sizes])

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard; 0 for those outside their source's limit."""
        return tuple(size for sizes in self._sizes for size in sizes)

    @property
    def fingerprint(self) -> str:
        """Eight digits of each source with its limit; weights are the order's."""
        return self._fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        own = {source.url: dataset.facts for source, dataset in zip(self.sources, self._datasets, strict=True)}
        return {**self._datasets[0].facts, "sources": own}

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        """The samples at ``(shards[i], indices[i])``, in that order."""
        owners = np.searchsorted(self._ends, shards, side="right")
        found: dict[int, Sample] = {}
        for owner in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == owner)
            first = int(self._ends[owner]) - len(self._sizes[owner])
            samples = self._datasets[owner].read(shards[mine] - first, indices[mine])
            found.update(zip(mine.tolist(), samples, strict=True))
        return [found[place] for place in range(len(shards))]

    def follow(self, order: SampleOrder, node: int, nodes: int) -> None:
        """Each source that fetches ahead gets its own part of the order in which this node is going to read.

        Under any other order than a mixture's the sources are read without a plan.
        """
        if not isinstance(order, MixedOrder):
            return
        self._counts = order.counts
        for place, dataset in enumerate(self._datasets):
            if isinstance(dataset, Streamed):
                dataset.follow(cast(Any, SourceOrder(order, place)), node, nodes)

    def advance(self, position: int) -> None:
        """The next batch begins at this position; a source is told how many of its own samples went before."""
        if self._counts is None:
            return
        for dataset, count in zip(self._datasets, self._counts(position), strict=True):
            if isinstance(dataset, Streamed):
                dataset.advance(count)

    def rest(self) -> None:
        """No one reads for now."""
        for dataset in self._datasets:
            if isinstance(dataset, Streamed):
                dataset.rest()

    def order(self, seed: int = 0, lanes: int = 16, window: int = 4096) -> MixedOrder:
        """The sequence of these samples under the sources' weights."""
        repeats = tuple(source.repeat for source in self.sources)
        given = tuple(source.weight for source in self.sources)
        weights = given if any(given) else weights_by_size(self._sizes, repeats)
        return MixedOrder(self._sizes, weights, repeats, seed, lanes, window)


@dataclass(frozen=True)
class MixedOrder:
    """The endless sequence of samples of several sources under one seed.

    ``shard_sizes`` are those of each source, ``weights`` their shares. After any p positions a source of weight w has
    given more than ``p * w / W - 1`` and fewer than ``p * w / W + 1`` samples (W: the sum of the weights). Each source
    is walked in passes under a seed of its own, as in :class:`~dltrain.data.order.Order`: every sample once in each.

    Lanes: a source's line is cut into ``lanes`` pieces, and position p reads lane ``p % lanes`` of whichever source it
    takes, so that a node reads its own lanes alone, of every source. For this a lane is as long as the number of the
    pass's samples that fall to its positions, and lanes are equal only on average; where positions were given to
    sources in blocks of ``lanes`` they would be equal, but shares would be off by up to a block.

    The choice of sources is stirred under the seed, as far as shares allow: weights of 1 and 1 in strict turns would
    give the even ranks one source and the odd ranks the other.
    """

    shard_sizes: tuple[tuple[int, ...], ...]
    weights: tuple[int, ...]
    repeats: tuple[int, ...] = ()
    seed: int = 0
    lanes: int = 16
    window: int = 4096

    def __post_init__(self) -> None:
        if not len(self.shard_sizes) == len(self.weights) == len(self.repeats or self.weights):
            raise UserError("a mixture needs one weight (and one repeat) for each of its sources")
        refuse_unusable(self.weights, self.lanes)

    @property
    def tails(self) -> tuple[str, ...]:
        """``carry`` alone: the sources' epochs end at places of their own."""
        return ("carry",)

    @cached_property
    def samples(self) -> int:
        """The mixture's epoch: the sizes of all sources, each ``repeat`` times."""
        repeats = self.repeats or (1,) * len(self.sizes)
        return sum(size * repeat for size, repeat in zip(self.sizes, repeats, strict=True))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of one pass over each source."""
        return tuple(sum(sizes) for sizes in self.shard_sizes)

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard (numbered over all sources) and index within it of the samples at ``positions``, int64 [n]."""
        table = self._table
        turn, slot = np.divmod(positions, len(table.source))
        source, lane = table.source[slot], positions % self.lanes
        epoch = (turn * table.per_turn[source] + table.taken[slot]) // self._size_of[source]
        taken = turn * table.per_lane[source, lane] + table.taken_of_lane[slot]
        numbers, which = distinct(epoch * len(self.weights) + source)
        return self._walks.some(numbers).find(which, lane, taken, self.window)

    def counts(self, position: int) -> list[int]:
        """Samples of each source before ``position``."""
        table = self._table
        turn, slot = divmod(position, len(table.source))
        inside = np.bincount(table.source[:slot], minlength=len(self.weights))
        return (turn * table.per_turn + inside).tolist()

    def state(self) -> dict[str, Any]:
        """What a cursor must find unchanged."""
        mine = {"seed": self.seed, "lanes": self.lanes, "window": self.window}
        return {"samples": self.samples, **mine, "weights": list(reduced(self.weights))}

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)

    @cached_property
    def _table(self) -> Table:
        return make_table(reduced(self.weights), self.lanes, derive(self.seed, _CHOICE))

    @cached_property
    def _size_of(self) -> Integers:
        return np.array(self.sizes, dtype=np.int64)

    @cached_property
    def _walks(self) -> Walks:
        """By number: the pass over source s in its epoch e is number ``e * sources + s``."""
        sources = len(self.weights)
        return Walks(lambda number: self._lay_out(number % sources, number // sources), keep=4 * sources)

    def walk(self, source: int, epoch: int) -> Pass:
        """A source's pass, its shards numbered over all sources."""
        return self._walks.one(epoch * len(self.weights) + source)

    def _lay_out(self, source: int, epoch: int) -> Pass:
        size, table = self.sizes[source], self._table
        before, after = table.lanes_of(source, epoch * size), table.lanes_of(source, (epoch + 1) * size)
        shards = np.asarray(self.shard_sizes[source], dtype=np.int64)
        seed = derive(self.seed, _SOURCES, source)
        return lay_out(shards, seed, epoch, after - before, before, self.first_shard(source))

    def first_shard(self, source: int) -> int:
        """Number of a source's first shard."""
        return sum(map(len, self.shard_sizes[:source]))


@dataclass(frozen=True)
class SourceOrder:
    """One source's part of a mixture as its own data set sees it: positions are its own samples, shards its own.

    What fetches ahead takes the lane from the place in the epoch, where a mixture takes it from its own position; so
    lanes are numbered anew in each epoch, and a node finds those that it reads.
    """

    mixture: MixedOrder
    source: int

    @property
    def lanes(self) -> int:
        return self.mixture.lanes

    @property
    def window(self) -> int:
        return self.mixture.window

    @property
    def samples(self) -> int:
        """Samples of one pass over the source."""
        return self.mixture.sizes[self.source]

    def walk(self, epoch: int) -> Pass:
        """The pass of the source's own ``epoch``."""
        walk, turn = self.mixture.walk(self.source, epoch), -epoch * self.samples % self.lanes
        starts, sizes, before = (np.roll(a, turn) for a in (walk.lane_starts, walk.lane_sizes, walk.lane_before))
        shards = walk.shards - self.mixture.first_shard(self.source)
        return replace(walk, shards=shards, lane_starts=starts, lane_sizes=sizes, lane_before=before)


def subset(shard_sizes: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Sizes of the shards cut down to ``limit`` samples in all: whole shards by a fixed key, the last one cut."""
    if not limit or limit >= sum(shard_sizes):
        return shard_sizes
    count = len(shard_sizes)
    key = np.full(count, derive(_SUBSET), dtype=np.uint64)
    shards = permute(np.arange(count), np.full(count, count), key)
    sizes = np.asarray(shard_sizes, dtype=np.int64)[shards]
    kept = np.empty_like(sizes)
    kept[shards] = np.clip(limit - (np.cumsum(sizes) - sizes), 0, sizes)
    return tuple(kept.tolist())


def _refuse_twins(sources: Sequence[Source]) -> None:
    if not sources:
        raise UserError("a mixture has no sources; name at least one in data.sources")
    urls = [source.url for source in sources]
    twin = next((url for url in urls if urls.count(url) > 1), None)
    if twin is not None:
        raise UserError(f"data.sources names {twin} more than once; name it once, with a weight or a repeat")
