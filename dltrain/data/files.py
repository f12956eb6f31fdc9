"""The bytes of a data set's shards, wherever they lie: on this host, behind a network, or in the node's cache of it.

All three answer one question: these ranges of these shards, please.

    files = open_files(manifest, cache)
    pieces = files.read([(3, [(512, 7000), (8192, 1)])])
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.manifest import Manifest
from dltrain.data.route import Route
from dltrain.data.sample import BadSample
from dltrain.errors import UserError
from dltrain.storage.settings import settings

Range = tuple[int, int]
"""First byte, and number of bytes."""

Bytes = NDArray[np.uint8]

Request = tuple[int, Sequence[Range]]
"""A shard, and ranges of it."""

GAP_BYTES = 64 << 10
"""Ranges closer than this are fetched by one request."""

OPEN_FILES = 128


class ShardFiles(Protocol):
    """Bytes of shards by number."""

    local: bool = False
    """Whether the shards lie on this host, where nothing has checked them on their way."""

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """The bytes of each range; fewer where a shard ends before."""
        ...

    def peek(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """The same, without fetching whole shards for it."""
        return self.read(requests)

    def rows(self, shard: int, starts: Sequence[int], size: int) -> Bytes:
        """``size`` bytes from each of ``starts``, uint8 [starts, size]. Raises :class:`BadSample` at a shard's end."""
        pieces = self.read([(shard, [(start, size) for start in starts])])[0]
        if any(len(piece) < size for piece in pieces):
            raise BadSample(f"shard {shard} is truncated")
        return np.frombuffer(b"".join(pieces), np.uint8).reshape(len(starts), size)

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        """The bytes of the shards' indexes."""
        ...

    def renew(self, shard: int) -> bool:
        """Whether reading a shard once more may give other bytes than those found damaged."""
        ...

    def follow(self, route: Route) -> None:
        """Which way the node goes, for files that are fetched ahead."""
        return

    def advance(self, position: int) -> None:
        """How far the node has come, for files that are fetched ahead."""
        return

    def rest(self) -> None:
        """No one reads for now: stop fetching ahead, until :meth:`advance` is called again."""
        return


class Handles:
    """Open files by shard, the least recently used closed first. Each read names its place, so threads share them."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()

    def get(self, shard: int) -> int | None:
        handle = self._open.get(shard)
        if handle is not None:
            self._open.move_to_end(shard)
        return handle

    def put(self, shard: int, handle: int) -> int:
        self.close(shard)
        self._open[shard] = handle
        while len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return handle

    def close(self, shard: int) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            os.close(handle)

    def close_removed(self) -> None:
        """Close files that have been removed: only then is their space on the disk free."""
        for shard, handle in list(self._open.items()):
            if not os.fstat(handle).st_nlink:
                self.close(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}  # another process opens its own

    def __del__(self) -> None:
        for shard in list(self._open):
            self.close(shard)


class LocalFiles(ShardFiles):
    """Shards that are files of this host."""

    local: bool = True

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._handles = Handles()

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        pread = os.pread
        answers = []
        for shard, ranges in requests:
            handle = self._handle(shard)
            answers.append([pread(handle, size, start) for start, size in ranges])
        return answers

    def rows(self, shard: int, starts: Sequence[int], size: int) -> Bytes:
        return read_rows(self._handle(shard), starts, size)

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        return [storage.read(self._manifest.index_url(shard)) for shard in shards]

    def renew(self, shard: int) -> bool:
        return False

    def _handle(self, shard: int) -> int:
        handle = self._handles.get(shard)
        return self._handles.put(shard, self._open(shard)) if handle is None else handle

    def _open(self, shard: int) -> int:
        url = self._manifest.shard_url(shard)
        try:
            return os.open(str(storage.local_path(url)), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open shard {url}: {error.strerror}") from None


class RangedFiles(ShardFiles):
    """Shards behind a network, of which nothing is kept: neighbouring ranges by one request, many at a time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        groups = [(shard, group) for shard, ranges in requests for group in _neighbours(ranges)]
        fetched = request_pool(os.getpid(), settings().in_flight).map(lambda job: self._fetch(*job), groups)
        answers: list[dict[int, bytes]] = []
        pieces = iter(zip(groups, fetched, strict=True))
        for _, ranges in requests:
            found: dict[int, bytes] = {}
            while len(found) < len(ranges):
                (_, group), data = next(pieces)
                start = group[0][1][0]
                found.update((place, data[first - start : first - start + size]) for place, (first, size) in group)
            answers.append(found)
        return [[found[place] for place in range(len(found))] for found in answers]

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        return list(request_pool(os.getpid(), settings().in_flight).map(self._index, shards))

    def renew(self, shard: int) -> bool:
        return True

    def _index(self, shard: int) -> bytes | bytearray:
        return storage.read(self._manifest.index_url(shard), 0, self._manifest.shards[shard].index_bytes)

    def _fetch(self, shard: int, group: list[tuple[int, Range]]) -> bytes:
        start, stop = group[0][1][0], max(first + size for _, (first, size) in group)
        return bytes(storage.read(self._manifest.shard_url(shard), start, stop))


def read_rows(handle: int, starts: Sequence[int], size: int) -> Bytes:
    """Pieces of an open file, each straight into its row."""
    rows = np.empty((len(starts), size), np.uint8)
    view, preadv = rows.reshape(-1).data, os.preadv
    got = [preadv(handle, [view[place * size : (place + 1) * size]], start) for place, start in enumerate(starts)]
    if got and min(got) < size:
        raise BadSample(f"the shard is truncated: {size} bytes from {starts[got.index(min(got))]} on are not all there")
    return rows


def _neighbours(ranges: Sequence[Range]) -> list[list[tuple[int, Range]]]:
    """Ranges with their places, grouped so that one request fetches each group; sorted by their first bytes."""
    groups: list[list[tuple[int, Range]]] = []
    reached = 0
    for place, (start, size) in sorted(enumerate(ranges), key=lambda item: item[1]):
        if groups and start - reached <= GAP_BYTES:
            groups[-1].append((place, (start, size)))
        else:
            groups.append([(place, (start, size))])
            reached = 0
        reached = max(reached, start + size)
    return groups


@lru_cache(maxsize=1)
def request_pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dltrain-range")
