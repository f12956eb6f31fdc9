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

from dltrain import storage
from dltrain.data.manifest import Manifest
from dltrain.data.route import Route
from dltrain.errors import UserError
from dltrain.storage.settings import settings

Range = tuple[int, int]
"""First byte, and number of bytes."""

Request = tuple[int, Sequence[Range]]
"""A shard, and ranges of it."""

GAP_BYTES = 64 << 10
"""Ranges closer than this are fetched by one request."""

OPEN_FILES = 128
"""Beside those of one batch."""


class ShardFiles(Protocol):
    """Bytes of shards by number."""

    local: bool = False
    """Whether the shards lie on this host, where nothing has checked them on their way."""

    def handles(self, shards: Sequence[int]) -> list[int | None]:
        """An open file for each shard, to be read until this is asked again; None for one to be read by ranges."""
        ...

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """The bytes of each range, without fetching whole shards for it; fewer where a shard ends before."""
        ...

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
    """Open files by shard. What is closed here stays open until :meth:`trim`, for someone may be reading it."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self._closing: list[int] = []

    def get(self, shard: int) -> int | None:
        handle = self._open.get(shard)
        if handle is not None:
            self._open.move_to_end(shard)
        return handle

    def put(self, shard: int, handle: int) -> int:
        self.close(shard)
        self._open[shard] = handle
        return handle

    def close(self, shard: int) -> None:
        handle = self._open.pop(shard, None)
        if handle is not None:
            self._closing.append(handle)

    def close_removed(self) -> None:
        """Close files that have been removed: only then is their space on the disk free."""
        for shard, handle in list(self._open.items()):
            if not os.fstat(handle).st_nlink:
                self.close(shard)

    def trim(self) -> None:
        """Nobody reads now: close what is to be closed, and the least recently used of too many."""
        while len(self._open) > OPEN_FILES:
            self._closing.append(self._open.popitem(last=False)[1])
        while self._closing:
            os.close(self._closing.pop())

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict(), "_closing": []}  # another process opens its own

    def __del__(self) -> None:
        for shard in list(self._open):
            self.close(shard)
        self.trim()


class LocalFiles(ShardFiles):
    """Shards that are files of this host."""

    local: bool = True

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._handles = Handles()

    def handles(self, shards: Sequence[int]) -> list[int | None]:
        self._handles.trim()
        return [self._handle(shard) for shard in shards]

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        return [[os.pread(self._handle(shard), size, start) for start, size in ranges] for shard, ranges in requests]

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

    def handles(self, shards: Sequence[int]) -> list[int | None]:
        return [None] * len(shards)

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
