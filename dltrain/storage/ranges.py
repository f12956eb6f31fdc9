"""Reading remote objects by parallel ranges, until they are whole.

One connection to S3 is capped at some 50 MB/s, so a read goes out as parts of some MiB, several at a time, each
straight into its place in one buffer. A part that is cut goes on from its last byte; one that fails waits a random time
that doubles (full jitter) and asks again. All answers must carry one tag: an object overwritten during the read is an
error, never a mixture of two.

    data = bytearray(64 << 20)
    assert Reading(store, "bucket/key", 0, memoryview(data)).run() == len(data)
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import lru_cache

from dltrain.storage.base import Cancelled, Interrupted, ObjectChanged, ObjectInfo, PastTheEnd, RemoteStore
from dltrain.storage.counters import count
from dltrain.storage.gate import gate
from dltrain.storage.settings import settings

SMALL = 1 << 20
"""Reads up to this are someone waiting, not a shard on its way; and what is asked for first where a size is unknown."""

SMALLEST_PART = 4 << 20
"""Below this a request costs more than the connection it opens up gives."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 20.0
_ATTEMPTS_BEFORE_CONTACT = 4
"""A store that never answered is more likely a mistake than a fault: it is told within seconds."""


def read_whole(store: RemoteStore, path: str) -> bytearray:
    """The object, whatever its size: its first answer tells how much is left."""
    data = bytearray(SMALL)
    reading = Reading(store, path, 0, memoryview(data))
    got = reading.run()
    if reading.info is None or reading.info.size <= SMALL:
        return data[:got]
    data = data + bytes(reading.info.size - SMALL)
    Reading(store, path, SMALL, memoryview(data)[SMALL:], reading.info.etag).run()
    return data


@contextmanager
def cancelled_by(event: threading.Event) -> Iterator[None]:
    """Reads of remote objects begun by this thread in the block raise :class:`Cancelled` soon after ``event`` is set.

    Within a tenth of a second where a part waits for its turn or its next attempt, else when the request in flight
    brings its next bytes or its time is out.
    """
    token = _stop.set(event)
    try:
        yield
    finally:
        _stop.reset(token)


_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


class _GivenUp(Exception):
    """A part that was not read to its end, since another one cannot be."""


class Reading:
    """One read of bytes from ``start`` into ``buffer``, of the object tagged ``etag`` where that is given."""

    def __init__(self, store: RemoteStore, path: str, start: int, buffer: memoryview, etag: str = "") -> None:
        self.info: ObjectInfo | None = None
        self._store, self._path, self._start, self._buffer = store, path, start, buffer
        self._etag = etag
        self._lock = threading.Lock()
        self._stop = _stop.get()
        self._failed = False
        """Another part has failed for good: the rest need not be read."""

    def run(self) -> int:
        """Fill the buffer; the bytes the object had. Raises :class:`ObjectChanged`, :class:`UserError`."""
        part = _part_bytes(len(self._buffer))
        firsts = range(0, len(self._buffer), part)
        if len(firsts) <= 1:
            return self._part(0, len(self._buffer))
        pool = _pool(os.getpid(), settings().in_flight)
        parts = [pool.submit(self._part, first, min(first + part, len(self._buffer))) for first in firsts]
        wait(parts)  # also after a failure: nobody may write into the buffer once it is given back
        failures = [failure for part in parts if (failure := part.exception()) is not None]
        if failures:
            raise next((failure for failure in failures if not isinstance(failure, _GivenUp)), failures[0])
        return sum(part.result() for part in parts)

    def _part(self, first: int, stop: int) -> int:
        """Fill ``buffer[first:stop]``, however many requests it takes."""
        done, failures = first, 0
        while done < stop:
            before = done
            try:
                self._go_on()
                for got in self._request(done, stop):
                    done += got
                return done - first
            except PastTheEnd:
                return done - first
            except Interrupted as error:
                failure = Interrupted(str(error), error.throttled)  # without frames, which hold pieces of the buffer
            except BaseException:
                self._failed = True
                raise
            failures = 1 if done > before else failures + 1
            self._pause(failure, failures)
        return done - first

    def _request(self, done: int, stop: int) -> Iterator[int]:
        """One request for ``buffer[done:stop]``; yields the bytes of each piece that has arrived in its place."""
        with gate().request(small=stop - done <= SMALL, go_on=self._go_on):
            count(requests=1)
            with closing(self._store.open(self._path, self._start + done, self._start + stop, self._etag)) as body:
                self._agree(body.info)
                stop = min(stop, body.info.size - self._start)
                while done < stop:
                    self._go_on()
                    got = body.readinto(self._buffer[done:stop])
                    if not got:
                        raise Interrupted("the connection closed early")
                    done += got
                    count(bytes=got)
                    yield got
        gate().succeeded()

    def _go_on(self) -> None:
        """Raise what ends a part before its end."""
        if self._failed:
            raise _GivenUp
        if self._stop is not None and self._stop.is_set():
            raise Cancelled

    def _agree(self, info: ObjectInfo) -> None:
        with self._lock:
            self._etag = self._etag or info.etag
            self.info = info
        if info.etag and info.etag != self._etag:
            raise ObjectChanged(
                f"{self._store.url(self._path)} was overwritten while it was being read (tag {info.etag}, before "
                f"{self._etag}); shards must not change: write a new data set beside the old one, and index it anew"
            )
        _met.add((os.getpid(), type(self._store)))

    def _pause(self, error: Interrupted, failures: int) -> None:
        """Wait before the next attempt, or give up."""
        self._go_on()
        attempts = settings().attempts if (os.getpid(), type(self._store)) in _met else _ATTEMPTS_BEFORE_CONTACT
        if failures >= attempts:
            self._failed = True
            raise self._store.unreachable(self._path, f"{failures} attempts, the last: {error}") from None
        count(retries=1)
        if error.throttled:
            count(throttled=1)
            gate().slow_down(time.monotonic())
        pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**failures))
        if self._stop is None:
            time.sleep(pause)
        else:
            self._stop.wait(pause)


def _part_bytes(size: int) -> int:
    """As large as the settings say, smaller where a read would leave requests unused."""
    mine = settings()
    share = -(-size // mine.in_flight >> 20) + 1 << 20
    return min(mine.part_mib << 20, max(SMALLEST_PART, share))


_met: set[tuple[int, type]] = set()
"""Processes and stores between which an answer has come."""


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dltrain-part")
