"""Shards behind a network, read from the node's cache of them.

A shard that is not there yet is fetched whole, by parallel ranges, by the first process that needs it. Only at the very
beginning, before the first window has arrived, samples are read by their own ranges where waiting for whole shards
would take longer: training begins, and goes on after a resume, at once.

    files = CachedFiles(manifest, NodeCache(Path("/tmp/shards")), Depth())
    files.follow(Route(order, sizes))
    files.advance(position=0)
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import google_crc32c
import numpy as np

from dltrain import storage
from dltrain.data.cache import Entry, Item, NodeCache, oldest_first
from dltrain.data.files import Opened, RangedFiles, Request, ShardFiles, at_once
from dltrain.data.manifest import Manifest
from dltrain.data.pages import Pages, open_pages
from dltrain.data.prefetch import Depth, Prefetcher
from dltrain.data.route import Route
from dltrain.errors import UserError
from dltrain.storage.counters import count
from dltrain.storage.settings import settings

PATIENCE = 1.0
"""Seconds a first batch may wait for whole shards before its samples are read by ranges."""

EXPECTED_RATE = 200e6
"""Bytes per second of a network that has not been measured yet."""

_PIECE = 1 << 20


_following: weakref.WeakSet[CachedFiles] = weakref.WeakSet()
"""All files of this process that follow a route: what one of them needs soon, another must not evict."""


class CachedFiles(ShardFiles):
    """Shards by number, each downloaded once per node."""

    def __init__(self, manifest: Manifest, cache: NodeCache, depth: Depth) -> None:
        self.cache = cache
        self._manifest, self._depth = manifest, depth
        self._items = [Item(manifest.shard_url(i), s.bytes, s.crc32c) for i, s in enumerate(manifest.shards)]
        self._indexes = [
            Item(manifest.index_url(i), s.index_bytes, s.index_crc32c) for i, s in enumerate(manifest.shards)
        ]
        self._damaged: set[int] = set()
        self._opened = Opened()
        self._ranged = RangedFiles(manifest)
        self._route: Route | None = None
        self._position = 0
        self._bandwidth = EXPECTED_RATE
        self._shards_by_name: dict[str, int] = {}
        self._prefetcher: tuple[int, Prefetcher] | None = None  # and the process it runs in

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._route is not None:
            _following.add(self)

    def follow(self, route: Route) -> None:
        """Fetch along a route from now on. Raises :class:`UserError` when the cache is too small for all routes."""
        self._route = route
        _following.add(self)
        needed = sum(files._needed() for files in self._neighbours())
        if self.cache.budget < needed:
            _following.discard(self)
            raise UserError(
                f"the cache {self.cache.folder} may hold {_gib(self.cache.budget)} GiB; two windows of "
                f"{self._manifest.url} and what is read beside it need {_gib(needed)} GiB: "
                f"give data.cache_gib at least that, or smaller data.window or data.lanes, or data.cache off"
            )

    def _needed(self) -> int:
        """Bytes of two windows and a shard on its way, and of the indexes."""
        route = self._route
        if route is None:
            return 0
        two_windows = max(route.needed(0), route.needed(1)) + int(route.shard_bytes.max())
        return min(two_windows, int(route.shard_bytes.sum())) + sum(item.bytes for item in self._indexes)

    def _neighbours(self) -> list[CachedFiles]:
        """The files of this process that share the cache and follow a route, these among them."""
        return [files for files in list(_following) if files.cache.folder == self.cache.folder]

    def advance(self, position: int) -> None:
        """The next batch begins at this position."""
        if self._route is None:
            return
        before, self._position = self._position, position
        process, prefetcher = self._prefetcher or (0, None)
        if prefetcher is None or process != os.getpid():
            prefetcher = Prefetcher(self._route, self._depth, self._holds, self._fetch_ahead, self._threads())
            self._prefetcher = (os.getpid(), prefetcher)
            prefetcher.start(position)
        prefetcher.advance(position)
        if self._route.window(position) != self._route.window(before):
            self._opened.close_unless(self._holds)

    def rest(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher[1].close()
            self._prefetcher = None

    def pages(self, shards: Sequence[int]) -> list[Pages | None]:
        found = {shard: self._present(shard) for shard in shards}
        missing = [shard for shard, pages in found.items() if pages is None]
        count(cache_hits=len(shards) - len(missing), cache_misses=len(missing))
        if missing and not self._is_in_a_hurry(missing):
            fetched = at_once(self._fetch, missing, discard=os.close)
            found.update((shard, self._take(shard, handle)) for shard, handle in zip(missing, fetched, strict=True))
        return [found[shard] for shard in shards]

    def read(self, requests: Sequence[Request]) -> list[list[bytes]]:
        return self._ranged.read(requests)

    def indexes(self, shards: Sequence[int]) -> list[bytes | bytearray]:
        return at_once(self._index, shards)

    def renew(self, shard: int) -> bool:
        if shard in self._damaged:
            return False
        self._opened.close(shard)
        self.cache.drop(self._items[shard])
        return True

    def _present(self, shard: int) -> Pages | None:
        pages = self._opened.get(shard)
        if pages is None:
            handle = self.cache.find(self._items[shard])
            pages = None if handle is None else self._take(shard, handle)
        return pages

    def _take(self, shard: int, handle: int) -> Pages:
        return self._opened.put(shard, open_pages(handle, self._items[shard].bytes))

    def _is_in_a_hurry(self, missing: Sequence[int]) -> bool:
        """Whether nothing has been fetched yet and waiting for these shards would be long."""
        warm = self._prefetcher is None or self._prefetcher[1].warm
        return not warm and sum(self._items[shard].bytes for shard in missing) > PATIENCE * self._bandwidth

    def _holds(self, shard: int) -> bool:
        return self.cache.holds(self._items[shard])

    def _fetch(self, shard: int) -> int:
        """An open copy of a shard, whatever must go for it."""
        handle = self.cache.fetch(self._items[shard], partial(self._download, shard), self._victims)
        if handle is None:
            raise AssertionError("fetching with waiting ends with a copy or an error")
        return handle

    def _fetch_ahead(self, shard: int) -> bool:
        """Bring a shard and its index in, unless another process is at it or what is needed sooner fills the cache."""
        until = self._until().get(self._items[shard].name, 0.0)
        victims = partial(self._victims, later_than=max(1.0, until))
        index = self._indexes[shard]
        wanted = ((index, partial(_read_all, index)), (self._items[shard], partial(self._download, shard)))
        for item, fill in wanted:
            handle = self.cache.fetch(item, fill, victims, wait=False)
            if handle is None:
                return False
            os.close(handle)
        return True

    def _index(self, shard: int) -> bytes:
        item = self._indexes[shard]
        handle = self.cache.fetch(item, partial(_read_all, item), self._victims)
        if handle is None:
            raise AssertionError("fetching with waiting ends with a copy or an error")
        try:
            data = os.pread(handle, item.bytes, 0)
        finally:
            os.close(handle)
        if google_crc32c.value(data) != item.crc32c:
            self.cache.drop(item)
            return bytes(storage.read(item.url, 0, item.bytes))  # the reader checks it again
        return data

    def _download(self, shard: int, view: memoryview) -> None:
        """Fill a copy and check it; what is damaged on the way is asked for once more."""
        item = self._items[shard]
        for _ in range(2):
            began = time.monotonic()
            _read_all(item, view)
            rate = item.bytes / max(time.monotonic() - began, 1e-3)
            self._bandwidth = 0.7 * self._bandwidth + 0.3 * rate
            if _crc32c(view) == item.crc32c:
                return
        self._damaged.add(shard)  # at its source: the copy is kept, and the reader names the sample when it comes to it

    def _until(self) -> dict[str, float]:
        """Windows until each of our shards, and its index, is needed, by names in the cache."""
        if self._route is None:
            return {}
        until = self._route.next_use(self._position)
        return {name: float(until[shard]) for name, shard in self._names().items()}

    def _victims(self, entries: Sequence[Entry], later_than: float = -1.0) -> Sequence[Entry]:
        """What no one here follows goes first, the oldest first; then what is needed last."""
        until = {name: windows for files in self._neighbours() for name, windows in files._until().items()}
        others = oldest_first([entry for entry in entries if entry.name not in until])
        ours = [(until[entry.name], entry) for entry in entries if until.get(entry.name, -1.0) > later_than]
        return [*others, *(entry for _, entry in sorted(ours, key=lambda pair: -pair[0]))]

    def _names(self) -> dict[str, int]:
        if not self._shards_by_name:
            both = (self._items, self._indexes)  # assigned whole, since threads ask for it too
            self._shards_by_name = {item.name: shard for items in both for shard, item in enumerate(items)}
        return self._shards_by_name

    def _threads(self) -> int:
        """Enough downloads at a time to keep all requests of this process in flight."""
        mine = settings()
        parts = max(1, int(np.mean([item.bytes for item in self._items])) // (mine.part_mib << 20))
        return max(2, min(mine.in_flight, -(-2 * mine.in_flight // parts)))


def _read_all(item: Item, view: memoryview) -> None:
    got = storage.read_into(item.url, 0, view)
    if got < item.bytes:
        raise UserError(f"{item.url} is truncated: it has {got} bytes where its manifest says {item.bytes}")


def _crc32c(view: memoryview) -> int:
    """Of all of it, piece by piece: the checksum takes bytes only, and a copy of a whole shard would be large."""
    crc = 0
    for start in range(0, len(view), _PIECE):
        crc = google_crc32c.extend(crc, bytes(view[start : start + _PIECE]))
    return crc


def _gib(size: int) -> str:
    """Rounded up, with as many digits as tell small caches apart."""
    return f"{-(-size * 10**6 // (1 << 30)) / 10**6:f}".rstrip("0").rstrip(".")
