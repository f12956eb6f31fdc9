"""The bytes of a data set's shards, wherever they lie: on this host, behind a network, or in the node's cache of it.

All three answer one question: these ranges of these shards, please.

    files = open_files(manifest, cache)
    pieces = files.read([(3, [(512, 7000), (8192, 1)])])
"""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import ClassVar, Protocol, TypeVar

from dltrain import storage
from dltrain.data.manifest import Manifest
from dltrain.data.pages import Pages, open_pages
from dltrain.data.route import Route
from dltrain.errors import UserError
from dltrain.storage.settings import settings

Job = TypeVar("Job")
Found = TypeVar("Found")

Range = tuple[int, int]
"""First byte, and number of bytes."""

Request = tuple[int, Sequence[Range]]
"""A shard, and ranges of it."""

GAP_BYTES = 64 << 10
"""Ranges closer than this are fetched by one request."""

GROUP_BYTES = 1 << 20
"""Larger than this a request is one of many behind which others wait (``storage/gate.py``)."""

OPEN_SHARDS = max(8, min(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
"""Of a process, shared evenly by its data sets."""


class ShardFiles(Protocol):
    """Bytes of shards by number."""

    def pages(self, shards: Sequence[int]) -> list[Pages | None]:
        """The bytes of each shard, by slices; None for one to be read by ranges."""
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


class Opened:
    """Open shards, the least recently used closed first; whoever reads one keeps it open."""

    _all: ClassVar[weakref.WeakSet[Opened]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._pages: OrderedDict[int, Pages] = OrderedDict()
        self._all.add(self)

    def get(self, shard: int) -> Pages | None:
        pages = self._pages.get(shard)
        if pages is not None:
            self._pages.move_to_end(shard)
        return pages

    def put(self, shard: int, pages: Pages) -> Pages:
        self._pages[shard] = pages
        while len(self._pages) > max(1, OPEN_SHARDS // len(self._all)):
            self._pages.popitem(last=False)
        return pages

    def close(self, shard: int) -> None:
        self._pages.pop(shard, None)

    def close_unless(self, kept: Callable[[int], bool]) -> None:
        """Close what is not to be kept: the space of a removed file is free only when nobody has it open."""
        for shard in [shard for shard in self._pages if not kept(shard)]:
            self.close(shard)

    def __reduce__(self) -> tuple[type[Opened], tuple[()]]:
        return Opened, ()  # another process opens its own


class LocalFiles(ShardFiles):
    """Shards that are files of this host."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._opened = Opened()

    def pages(self, shards: Sequence[int]) -> list[Pages | None]:
        return [self._opened.get(shard) or self._opened.put(shard, self._open(shard)) for shard in shards]

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        opened = self.pages([shard for shard, _ in requests])
        return [
            [pages[start : start + size] for start, size in ranges]
            for pages, (_, ranges) in zip(opened, requests, strict=True)
            if pages is not None
        ]

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        return [storage.read(self._manifest.index_url(shard)) for shard in shards]

    def renew(self, shard: int) -> bool:
        return False

    def _open(self, shard: int) -> Pages:
        url = self._manifest.shard_url(shard)
        try:
            handle = os.open(str(storage.local_path(url)), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open shard {url}: {error.strerror}") from None
        return open_pages(handle, self._manifest.shards[shard].bytes)


class RangedFiles(ShardFiles):
    """Shards behind a network, of which nothing is kept: neighbouring ranges by one request, many at a time."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def pages(self, shards: Sequence[int]) -> list[Pages | None]:
        return [None] * len(shards)

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        groups = [(shard, group) for shard, ranges in requests for group in _neighbours(ranges)]
        fetched = at_once(lambda job: self._fetch(*job), groups)
        answers: list[dict[int, bytes]] = []
        pieces = iter(zip(groups, fetched, strict=True))
        for _, ranges in requests:
            found: dict[int, bytes] = {}
            while len(found) < len(ranges):
                (_, group), cut = next(pieces)
                found.update(zip((place for place, _ in group), cut, strict=True))
            answers.append(found)
        return [[found[place] for place in range(len(found))] for found in answers]

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        return at_once(self._index, shards)

    def renew(self, shard: int) -> bool:
        return True

    def _index(self, shard: int) -> bytes | bytearray:
        return storage.read(self._manifest.index_url(shard), 0, self._manifest.shards[shard].index_bytes)

    def _fetch(self, shard: int, group: list[tuple[int, Range]]) -> list[bytes]:
        """The ranges of a group alone: what lies between them is not kept."""
        start, stop = group[0][1][0], max(first + size for _, (first, size) in group)
        data = storage.read(self._manifest.shard_url(shard), start, stop)
        return [bytes(data[first - start : first - start + size]) for _, (first, size) in group]


def _neighbours(ranges: Sequence[Range]) -> list[list[tuple[int, Range]]]:
    """Ranges with their places, grouped so that one request fetches each group; sorted by their first bytes."""
    groups: list[list[tuple[int, Range]]] = []
    first = reached = 0
    for place, (start, size) in sorted(enumerate(ranges), key=lambda item: item[1]):
        if groups and start - reached <= GAP_BYTES and start + size - first <= GROUP_BYTES:
            groups[-1].append((place, (start, size)))
        else:
            groups.append([(place, (start, size))])
            first, reached = start, 0
        reached = max(reached, start + size)
    return groups


def at_once(
    read: Callable[[Job], Found], jobs: Sequence[Job], discard: Callable[[Found], None] = lambda found: None
) -> list[Found]:
    """``read(job)`` for every job, by threads. A failure ends the others' reads and is raised; what they found until
    then is given to ``discard``."""
    failed = threading.Event()

    def attempt(job: Job) -> Found:
        try:
            with storage.cancelled_by(failed):
                return read(job)
        except BaseException:
            failed.set()
            raise

    futures = [_pool(os.getpid(), settings().in_flight).submit(attempt, job) for job in jobs]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    except BaseException:  # Ctrl-C
        failed.set()
        raise
    finally:
        if failed.is_set():
            for future in futures:
                future.cancel()
                future.add_done_callback(lambda done: _discard(done, discard))
    if not failed.is_set():
        return [future.result() for future in futures]
    wait(futures)  # the buffers they fill are given back next
    failures = [failure for future in futures if not future.cancelled() and (failure := future.exception()) is not None]
    raise next((failure for failure in failures if not isinstance(failure, storage.Cancelled)), failures[0])


def _discard(future: Future[Found], discard: Callable[[Found], None]) -> None:
    if not future.cancelled() and future.exception() is None:
        discard(future.result())


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dltrain-range")
