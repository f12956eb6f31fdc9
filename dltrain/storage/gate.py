"""How many requests may be in flight: per process, and together on one node.

A process starts with its full number, halves it when a server asks it to slow down, and gains one again for each round
of successes (additive increase, multiplicative decrease; Chiu and Jain 1989). The node's number is a set of files, each
locked by one request at a time: the kernel frees a lock when its holder dies, so nothing is left behind by a crash.

    with gate().request():
        fetch()
"""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from dltrain.storage.settings import settings

_LOOK_SECONDS = 0.1
"""How often one who waits in this process looks whether that is still wanted."""

_TURN_SECONDS = 0.02
"""And one who waits for the node, whether a place is free: on average half of it, a third of a request's time."""

_CALM_SECONDS = 1.0
"""Several requests fail at once when a server is overrun: that is one reason to halve, not many."""


class Gate:
    """At most ``most`` large and as many small requests of this process at a time; ``slots`` of the node, 0 for any."""

    def __init__(self, most: int, slots: int, folder: Path) -> None:
        self._most = most
        self._limit = float(most)
        self._running = [0, 0]  # large requests, and small ones
        self._changed = threading.Condition()
        self._halved_at = -_CALM_SECONDS
        self._slots = slots
        self._folder = folder
        if slots:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def limit(self) -> int:
        """Requests this process allows itself now."""
        return max(1, int(self._limit))

    @contextmanager
    def request(self, small: bool = False, go_on: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for a place, and keep it while the block runs.

        Small requests, for which someone waits, have places of their own: they do not queue behind parts of large ones.
        ``go_on`` is asked again and again while waiting, and raises where that is in vain.
        """
        with self._changed:
            while self._running[small] >= self.limit:
                self._changed.wait(_LOOK_SECONDS)
                go_on()
            self._running[small] += 1
        try:
            with self._slot(go_on):
                go_on()
                yield
        finally:
            with self._changed:
                self._running[small] -= 1
                self._changed.notify_all()

    def succeeded(self) -> None:
        """A request went through: one more is allowed after each round of them."""
        with self._changed:
            before = self.limit
            self._limit = min(float(self._most), self._limit + 1 / self._limit)
            if self.limit > before:
                self._changed.notify_all()

    def slow_down(self, now: float) -> None:
        """The server asked for fewer requests; ``now`` is a monotonic time in seconds."""
        with self._changed:
            if now - self._halved_at >= _CALM_SECONDS:
                self._limit, self._halved_at = max(1.0, self._limit / 2), now

    @contextmanager
    def _slot(self, go_on: Callable[[], None]) -> Iterator[None]:
        if not self._slots:
            yield
            return
        handle = self._take(go_on)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child forked meanwhile has the file open too
            os.close(handle)

    def _take(self, go_on: Callable[[], None]) -> int:
        """An open, locked file: the first that is free."""
        while True:
            first = random.randrange(self._slots)
            for place in range(self._slots):
                handle = self._open((first + place) % self._slots)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return handle
                except BlockingIOError:
                    os.close(handle)
            time.sleep(random.uniform(0, _TURN_SECONDS))
            go_on()

    def _open(self, slot: int) -> int:
        file, flags = self._folder / f"request-{slot:04d}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(file, flags, 0o600)
        except FileNotFoundError:  # someone has cleared the temporary folder
            self._folder.mkdir(parents=True, exist_ok=True)
            return os.open(file, flags, 0o600)


def gate() -> Gate:
    """The gate of this process."""
    mine = settings()
    return _gate(os.getpid(), mine.in_flight, mine.node_in_flight)


@lru_cache(maxsize=1)
def _gate(process: int, most: int, slots: int) -> Gate:
    return Gate(most, slots, Path(tempfile.gettempdir()) / f"dltrain-{os.getuid()}" / "requests")
