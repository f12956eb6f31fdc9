"""Fetching ahead of the reader: threads that bring the route's next shards into the node's cache.

All processes of a node follow one route and each skips what another is fetching, so together they divide the work. The
depth is counted in bytes and in seconds of training, and ends where the cache is full: nothing that is needed sooner is
ever evicted for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dltrain import storage
from dltrain.data.route import Route
from dltrain.errors import UserError

_BUSY_SECONDS = 0.2
"""How soon to look again at a shard that another process is fetching."""

_FAILED_SECONDS = 10.0
"""And at one that could not be fetched."""


@dataclass(frozen=True)
class Depth:
    """How far ahead to fetch, beyond the current and the next window: until both are reached."""

    bytes: int = 1 << 30
    seconds: float = 30.0


class Prefetcher:
    """Runs ``threads`` threads until closed, which ends downloads under way.

    ``fetch(shard)`` brings one in, or says no; ``holds`` is quick.
    """

    def __init__(
        self,
        route: Route,
        depth: Depth,
        holds: Callable[[int], bool],
        fetch: Callable[[int], bool],
        threads: int,
    ) -> None:
        self.warm = False
        """Whether the shards of the current window have been there all at once."""
        self._route, self._depth, self._holds, self._fetch = route, depth, holds, fetch
        self._position, self._began = 0, (0, time.monotonic())
        self._window: tuple[int, int] | None = None
        self._soon: list[tuple[int, int]] = []
        self._later: dict[int, float] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._threads = [threading.Thread(target=self._run, name="dltrain-ahead", daemon=True) for _ in range(threads)]

    def start(self, position: int) -> None:
        """Begin at a position."""
        self._position, self._began = position, (position, time.monotonic())
        for thread in self._threads:
            thread.start()

    def advance(self, position: int) -> None:
        """The reader has come so far. Raises what has ended a thread, if anything has."""
        if self._failure is not None:
            raise self._failure
        if self._route.window(position) == self._window:
            self._position = position
            return
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, and soon the requests under way; it does not wait for them."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with storage.cancelled_by(self._closed):
                self._fetch_ahead()
        except storage.Cancelled:
            return
        except Exception as error:  # noqa: BLE001  raised again where the reader is
            self._failure = error

    def _fetch_ahead(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                shard = self._next()
                if shard is None:
                    self._changed.wait(_BUSY_SECONDS if self._later else 1.0)
                    continue
                self._later[shard] = np.inf
            self._later[shard] = time.monotonic() + self._try(shard)

    def _try(self, shard: int) -> float:
        """Fetch a shard; the seconds after which to look at it again."""
        try:
            return 0.0 if self._fetch(shard) else _BUSY_SECONDS
        except (UserError, OSError):
            return _FAILED_SECONDS  # the reader meets the same failure where it needs the shard, and tells it then

    def _next(self) -> int | None:
        """The first shard on the route that is neither there nor being fetched, within the depth."""
        window = self._route.window(self._position)
        if window != self._window:
            self._window, self._soon = window, self._look_ahead()
        now, complete = time.monotonic(), True
        for shard, until in self._soon:
            if self._holds(shard):
                self._later.pop(shard, None)
                continue
            complete = complete and until > 0
            if self._later.get(shard, 0.0) <= now:
                return shard
        self.warm = self.warm or complete
        return None

    def _look_ahead(self) -> list[tuple[int, int]]:
        """Shards of the current and the next window, and as many more as the depth asks for."""
        soon: list[tuple[int, int]] = []
        found, enough = 0, max(self._depth.bytes, int(self._depth.seconds * self._bytes_per_second()))
        shards, seen = len(self._route.shard_bytes), set[int]()
        beyond = np.isinf(self._route.next_use(self._position))  # for whom the next epoch has no use either
        for shard, until in self._route.ahead(self._position):
            if (until > 1 and found >= enough) or len(seen) == shards or beyond[shard]:
                return soon
            if shard not in seen:
                seen.add(shard)
                soon.append((shard, until))
                found += int(self._route.shard_bytes[shard])
        return soon

    def _bytes_per_second(self) -> float:
        """What the node reads at the pace so far."""
        (first, began), route = self._began, self._route
        mean = float(route.shard_bytes.sum()) / route.order.samples / route.nodes
        return (self._position - first) * mean / max(time.monotonic() - began, 1.0)
