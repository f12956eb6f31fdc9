"""Reading samples by shard and index.

Where the shards that are read in turn fit the memory budget, they are read whole, by parallel ranged reads, and checked
once against the manifest's checksum; else the wanted members are read by their byte ranges, each checked against the
index. Either way a damaged byte is an error that names the shard, the key and the offset.

    dataset = open_dataset("s3://bucket/digits/train")
    samples = dataset.read(*Order(dataset.shard_sizes).locate(np.arange(64)))
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import google_crc32c
import numpy as np

from dltrain import storage
from dltrain.data.index import ShardIndex, Span
from dltrain.data.manifest import Manifest, load_manifest
from dltrain.data.order import Integers
from dltrain.data.sample import Sample
from dltrain.errors import UserError

GAP_BYTES = 64 << 10
"""Ranges closer than this are fetched by one request."""

PARALLEL_READS = 8
INDEXES_KEPT = 256

V = TypeVar("V")


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
        """The samples at ``(shards[i], indices[i])``, in that order."""
        ...


class ShardReader:
    """Bytes of a data set's shards, with a bounded memory of whole shards and of indexes."""

    def __init__(self, manifest: Manifest, memory: int, shards_in_use: int = 1) -> None:
        self.manifest = manifest
        self._memory = memory
        # whole shards only where all that are read in turn fit: else each would push out the next one needed
        largest = max((shard.bytes for shard in manifest.shards), default=0)
        self._holds_whole = min(shards_in_use, len(manifest.shards)) * largest <= memory
        self._whole: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_whole": OrderedDict(), "_indexes": OrderedDict()}

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, read when first asked for."""
        return _remember(self._indexes, shard, self._load_index, lambda: len(self._indexes) > INDEXES_KEPT)

    def read(self, shard: int, spans: list[Span], keys: list[str]) -> list[memoryview]:
        """The bytes of each span (whole members of the samples ``keys``), checked."""
        if self._holds_whole:
            data = memoryview(self._load_whole(shard))
            return [data[span.start : span.stop] for span in spans]
        pieces = self.read_ranges(shard, spans)
        for span, piece, key in zip(spans, pieces, keys, strict=True):
            self._check(shard, span, piece, key)
        return pieces

    def read_part(self, shard: int, start: int, stop: int) -> memoryview:
        """Bytes inside a member; unchecked where the shard is not held whole, for checksums cover whole members."""
        if self._holds_whole:
            return memoryview(self._load_whole(shard))[start:stop]
        return self.read_ranges(shard, [Span(start, stop, 0)])[0]

    def _load_whole(self, shard: int) -> bytes | bytearray:
        def too_much() -> bool:
            return sum(len(data) for data in self._whole.values()) > self._memory

        return _remember(self._whole, shard, self._read_whole, too_much)

    def _read_whole(self, shard: int) -> bytes | bytearray:
        info, url = self.manifest.shards[shard], self.manifest.shard_url(shard)
        data = storage.read(url, 0, info.bytes)
        if len(data) < info.bytes:
            raise UserError(f"shard {url} is truncated: it has {len(data)} bytes where its manifest says {info.bytes}")
        if google_crc32c.value(bytes(data)) != info.crc32c:
            self._find_damage(shard, memoryview(data))
        return data

    def _find_damage(self, shard: int, data: memoryview) -> None:
        index = self.index(shard)
        for place, key in enumerate(index.keys):
            for span in index.fields(place).values():
                self._check(shard, span, data[span.start : span.stop], key)
        raise UserError(
            f"shard {self.manifest.shard_url(shard)} is not the one its manifest describes "
            "(checksum differs outside its members); write or index the data set anew"
        )

    def _check(self, shard: int, span: Span, piece: memoryview, key: str) -> None:
        url = self.manifest.shard_url(shard)
        if len(piece) < span.stop - span.start:
            raise UserError(f"shard {url} is truncated: sample {key!r} should end at byte {span.stop}")
        if google_crc32c.value(bytes(piece)) != span.crc32c:
            raise UserError(
                f"sample {key!r} of shard {url} is damaged (checksum of bytes {span.start}-{span.stop}); "
                "write the shard anew"
            )

    def read_ranges(self, shard: int, spans: list[Span]) -> list[memoryview]:
        """Bytes of each span, unchecked: neighbouring spans by one ranged read, several reads at a time."""
        url = self.manifest.shard_url(shard)
        order = sorted(range(len(spans)), key=lambda place: spans[place].start)
        groups: list[list[int]] = []
        for place in order:
            if groups and spans[place].start - max(spans[i].stop for i in groups[-1]) <= GAP_BYTES:
                groups[-1].append(place)
            else:
                groups.append([place])

        def fetch(group: list[int]) -> list[tuple[int, memoryview]]:
            start, stop = spans[group[0]].start, max(spans[i].stop for i in group)
            data = memoryview(storage.read(url, start, stop))
            return [(place, data[spans[place].start - start : spans[place].stop - start]) for place in group]

        pieces = dict(pair for pairs in _pool(os.getpid()).map(fetch, groups) for pair in pairs)
        return [pieces[place] for place in range(len(spans))]

    def _load_index(self, shard: int) -> ShardIndex:
        info = self.manifest.shards[shard]
        url = storage.join(self.manifest.url, info.index)
        data = storage.read(url, 0, info.index_bytes)
        if google_crc32c.value(bytes(data)) != info.index_crc32c:
            raise UserError(f"index {url} is damaged or not the one its manifest describes; index the data set anew")
        try:
            index = ShardIndex.from_bytes(data)
        except (KeyError, ValueError) as error:
            raise UserError(f"{url} is not an index of a shard ({error}); index the data set anew") from None
        if len(index) != info.samples:
            raise UserError(
                f"{url} has {len(index)} samples where the manifest says {info.samples}; index the data set anew"
            )
        return index


class ShardDataset:
    """A data set whose samples are the members of its shards."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._sizes = tuple(shard.samples for shard in reader.manifest.shards)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def fingerprint(self) -> str:
        return self._reader.manifest.fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        return self._reader.manifest.facts

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        samples: list[Sample | None] = [None] * len(shards)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard).tolist()
            for place, sample in zip(places, self._read_shard(int(shard), indices[places].tolist()), strict=True):
                samples[place] = sample
        return [sample for sample in samples if sample is not None]

    def _read_shard(self, shard: int, wanted: list[int]) -> list[Sample]:
        index, url = self._reader.index(shard), self._reader.manifest.shard_url(shard)
        fields = [index.fields(sample) for sample in wanted]
        spans = [span for spans in fields for span in spans.values()]
        keys = [index.keys[sample] for sample, spans in zip(wanted, fields, strict=True) for _ in spans]
        pieces = iter(self._reader.read(shard, spans, keys))
        return [
            Sample(index.keys[sample], {name: next(pieces) for name in spans}, f"{url}#{index.keys[sample]}")
            for sample, spans in zip(wanted, fields, strict=True)
        ]


@dataclass(frozen=True)
class Reach:
    """What decides how many shards one rank reads in turn: the order's lanes and window, and the data ranks."""

    lanes: int = 16
    window: int = 4096
    ranks: int = 1

    def shards(self, manifest: Manifest) -> int:
        """Shards under this rank's lanes at one time: those a window touches, in each of its lanes."""
        samples = max(1, manifest.samples // len(manifest.shards))
        lanes = self.lanes // math.gcd(self.lanes, self.ranks)
        return min(len(manifest.shards), lanes * (-(-self.window // samples) + 1))


def open_reader(url: str, memory: int = 256, reach: Reach | None = None) -> ShardReader:
    """A reader of the data set at ``url`` that keeps up to ``memory`` MiB of whole shards."""
    from dltrain.data.bundled import materialise

    manifest = load_manifest(materialise(url))
    return ShardReader(manifest, memory << 20, (reach or Reach()).shards(manifest))


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="dltrain-read")


def _remember(cache: OrderedDict[int, V], key: int, load: Callable[[int], V], too_much: Callable[[], bool]) -> V:
    """Least recently used first out, while there is too much and more than one."""
    if key not in cache:
        cache[key] = load(key)
        while too_much() and len(cache) > 1:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
