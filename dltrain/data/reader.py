"""Reading samples by shard and index.

Every byte handed out has been compared with its checksum: a damaged one is fetched again where that may help, and is an
error that names shard, key and offset where it does not.

    dataset = open_dataset("s3://bucket/digits/train")
    samples = dataset.read(*Order(dataset.shard_sizes).locate(np.arange(64)))
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import google_crc32c
import numpy as np

from dltrain.data.files import ShardFiles
from dltrain.data.index import Member, ShardIndex
from dltrain.data.manifest import Manifest
from dltrain.data.memory import keep_freed_memory
from dltrain.data.order import Integers, SampleOrder
from dltrain.data.pages import Pages
from dltrain.data.route import Line, Route
from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError
from dltrain.storage.counters import count

INDEXES_KEPT = 1024


class Dataset(Protocol):
    """Samples addressed by shard and index."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the data do."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of the data: class names, scales."""
        ...

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        """The samples at ``(shards[i], indices[i])``, in that order. Raises :class:`BadSample`."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """A data set that fetches ahead when it knows the way."""

    def follow(self, order: SampleOrder, node: int, nodes: int) -> None:
        """The order in which this node, one of ``nodes``, is going to read."""
        ...

    def advance(self, position: int) -> None:
        """The next batch begins at this position."""
        ...

    def rest(self) -> None:
        """No one reads for now."""
        ...


class ShardReader:
    """Members of a data set's shards, checked; a bounded number of indexes is kept."""

    def __init__(self, manifest: Manifest, files: ShardFiles) -> None:
        self.manifest = manifest
        self.files = files
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        keep_freed_memory()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_freed_memory()  # of a worker

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, read when first asked for."""
        return self.indexes([shard])[0]

    def indexes(self, shards: Sequence[int]) -> list[ShardIndex]:
        """The indexes of several shards; those not read before are fetched at the same time."""
        missing = [shard for shard in dict.fromkeys(shards) if shard not in self._indexes]
        if missing:
            loaded = zip(missing, self.files.indexes(missing), strict=True)
            self._indexes.update((shard, parse_index(self.manifest, shard, data)) for shard, data in loaded)
        found = [self._indexes[shard] for shard in shards]
        while len(self._indexes) > INDEXES_KEPT:
            self._indexes.popitem(last=False)
        return found

    def samples(self, shards: Sequence[int], indices: Sequence[int]) -> list[Sample]:
        """Whole samples. Raises :class:`BadSample` naming the first that is damaged."""
        groups: dict[int, list[int]] = {}
        for place, shard in enumerate(shards):
            groups.setdefault(shard, []).append(place)
        tables, opened = self.indexes(list(groups)), self.files.pages(list(groups))
        by_ranges: list[tuple[int, int, Member]] = []  # place, shard, member
        found: list[Any] = [None] * len(shards)
        for (shard, places), table, pages in zip(groups.items(), tables, opened, strict=True):
            url = self.manifest.shard_url(shard)
            for place in places:
                members = table.members(indices[place])
                fields = {} if pages is None else self._read_members(shard, pages, members)
                found[place] = Sample(table.key(indices[place]), fields, url)
                if pages is None:
                    by_ranges += [(place, shard, member) for member in members]
        if by_ranges:
            self._read_by_ranges(by_ranges, found)
        return found

    def _read_members(self, shard: int, pages: Pages, members: list[Member]) -> dict[str, Any]:
        """The fields of one sample, each compared with its checksum while it is still in the processor's cache."""
        crc32c, fields = google_crc32c.value, {}
        for name, start, size, expected in members:
            piece = pages[start : start + size]
            if crc32c(piece) != expected:
                piece = self._read_again(shard, (name, start, size, expected), len(piece))
            fields[name] = piece
        return fields

    def _read_by_ranges(self, wanted: list[tuple[int, int, Member]], samples: list[Sample]) -> None:
        requests: dict[int, list[tuple[int, Member]]] = {}
        for place, shard, member in wanted:
            requests.setdefault(shard, []).append((place, member))
        ranges = [(shard, [(start, size) for _, (_, start, size, _) in rest]) for shard, rest in requests.items()]
        for (shard, rest), pieces in zip(requests.items(), self.files.read(ranges), strict=True):
            for (place, member), piece in zip(rest, pieces, strict=True):
                good = google_crc32c.value(piece) == member[3]
                samples[place].fields[member[0]] = piece if good else self._read_again(shard, member, len(piece))

    def _read_again(self, shard: int, member: Member, got: int) -> bytes:
        """A damaged piece once more, from the source if there is one behind the copy."""
        _, start, size, expected = member
        if self.files.renew(shard):
            piece = self.files.read([(shard, [(start, size)])])[0][0]
            if google_crc32c.value(piece) == expected:
                return piece
            got = len(piece)
        raise self._damage(shard, member, got)

    def _damage(self, shard: int, member: Member, got: int) -> BadSample:
        name, start, size, _ = member
        url, index = self.manifest.shard_url(shard), self.index(shard)
        key = index.key(int(np.searchsorted(index.first, np.searchsorted(index.offset, start), side="right")) - 1)
        if got < size:
            return BadSample(
                f"shard {url} is truncated: field {name!r} of sample {key!r} should end at byte {start + size}"
            )
        return BadSample(
            f"sample {key!r} of shard {url} is damaged (checksum of field {name!r}, bytes {start}-{start + size}); "
            "write the shard anew"
        )


def parse_index(manifest: Manifest, shard: int, data: bytes | bytearray) -> ShardIndex:
    """The index of a shard. Raises :class:`UserError` when it is not the one that the manifest describes."""
    info, url = manifest.shards[shard], manifest.index_url(shard)
    if google_crc32c.value(bytes(data)) != info.index_crc32c:
        raise UserError(f"index {url} is damaged or not the one its manifest describes; index the data set anew")
    try:
        index = ShardIndex.from_bytes(data)
    except (KeyError, ValueError) as error:
        raise UserError(f"{url} is not an index of a shard ({error}); index the data set anew") from None
    if len(index) != info.samples:
        raise UserError(f"{url} has {len(index)} samples, the manifest says {info.samples}; index the data set anew")
    return index


class ShardDataset:
    """A data set whose samples are the members of its shards."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self._sizes = tuple(shard.samples for shard in reader.manifest.shards)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def fingerprint(self) -> str:
        return self.reader.manifest.fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        return self.reader.manifest.facts

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        began = time.perf_counter()
        samples = self.reader.samples(shards.tolist(), indices.tolist())
        count(read_seconds=time.perf_counter() - began)
        return samples

    def follow(self, order: SampleOrder, node: int, nodes: int) -> None:
        follow(self.reader, order, node, nodes)

    def advance(self, position: int) -> None:
        self.reader.files.advance(position)

    def rest(self) -> None:
        self.reader.files.rest()


def follow(reader: ShardReader, order: SampleOrder, node: int, nodes: int) -> None:
    """Show the reader's files the way of one node, where the order walks a single line of shards."""
    if isinstance(order, Line):
        sizes = np.array([shard.bytes for shard in reader.manifest.shards], dtype=np.int64)
        reader.files.follow(Route(order, sizes, node, nodes))
