"""Copies of remote shards on this node's disk, shared by all its processes.

Whoever needs a shard first downloads it; the others wait for that one download. An entry is a file under a name made of
URL, size and checksum; it appears whole, by a rename. While it is on its way it is a ``.part`` file, locked by the
process that fills it: the kernel frees the lock when that process dies, and the next one starts the part anew. Nothing
else is kept on disk or in shared memory, so there is nothing to repair after a kill.

    states of an entry:  absent -> part (locked) -> whole -> absent (evicted, or found damaged)

Entries are evicted by unlinking: a process that has one open keeps reading it.

    cache = NodeCache(Path("/tmp/shards"), budget=10 << 30)
    handle = cache.fetch(item, fill=download, victims=oldest_first)
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import ENOSPC
from functools import cached_property
from pathlib import Path

from dltrain.errors import UserError
from dltrain.storage.counters import count

_CLEARED = 5
"""How often the folder may be cleared during one download before that is an error."""

Fill = Callable[[memoryview], None]
"""Writes the object's bytes into the buffer, or raises."""


@dataclass(frozen=True)
class Item:
    """An object that may be kept: its URL, bytes and crc32c."""

    url: str
    bytes: int
    crc32c: int

    @cached_property
    def name(self) -> str:
        """File name in the cache: other content or another place is another name."""
        return hashlib.sha256(f"{self.url} {self.bytes} {self.crc32c}".encode()).hexdigest()[:32] + ".shard"


@dataclass(frozen=True)
class Entry:
    """A whole copy in the cache; ``used`` is when a process last opened it, in seconds of the epoch."""

    name: str
    bytes: int
    used: float


Victims = Callable[[Sequence[Entry]], Sequence[Entry]]
"""Of the entries there are, those that may go, the first to go first."""


def oldest_first(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Least recently opened first: the choice of one who does not know what comes next."""
    return sorted(entries, key=lambda entry: entry.used)


class NodeCache:
    """A folder on a local disk that holds at most ``budget`` bytes; 0 takes three quarters of what is free."""

    def __init__(self, folder: Path, budget: int = 0) -> None:
        self.folder = folder
        try:
            os.close(self._create(folder / ".budget"))
        except OSError as error:
            raise UserError(
                f"cannot keep shards in {folder} ({error.strerror}); give data.cache another folder"
            ) from None
        self.budget = budget or self._share_of_the_disk()

    def find(self, item: Item) -> int | None:
        """An open file of the whole copy, or None. The caller closes it."""
        try:
            handle = os.open(self.folder / item.name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with suppress(OSError):  # in a cache one may only read, entries have no ages
            os.utime(handle)
        return handle

    def holds(self, item: Item) -> bool:
        """Whether there is a whole copy now."""
        return (self.folder / item.name).exists()

    def fetch(self, item: Item, fill: Fill, victims: Victims = oldest_first, wait: bool = True) -> int | None:
        """An open file of the whole copy, made by ``fill`` if there is none.

        Without ``wait``: None where another process is at it, or where ``victims`` leave no room.
        Raises :class:`UserError` when the item can never fit, or the disk is full.
        """
        if item.bytes > self.budget:
            raise UserError(
                f"{item.url} has {item.bytes} bytes, more than the {self.budget} of the cache {self.folder}; "
                "give data.cache_gib more, or data.cache off"
            )
        for cleared in range(_CLEARED):
            try:
                return self._fetch(item, fill, victims, wait)
            except FileNotFoundError as error:
                if cleared == _CLEARED - 1:
                    raise self._fails(item, error) from None
            except OSError as error:
                raise self._fails(item, error) from None
        return None

    def _fetch(self, item: Item, fill: Fill, victims: Victims, wait: bool) -> int | None:
        while True:
            found = self.find(item)
            if found is not None:
                return found
            with self._claim(item, wait) as part:
                if part is None:
                    return None
                if not self._is(part, self._part(item)):
                    continue  # its former holder finished, or was evicted: look again
                found = self.find(item)
                if found is not None:  # finished between the first look and the claim of a new part
                    self._part(item).unlink()
                    return found
                if not self._admit(item, part, victims, wait):
                    self._part(item).unlink()
                    return None
                return self._complete(item, part, fill, victims)

    def _fails(self, item: Item, error: OSError) -> UserError:
        return UserError(
            f"the cache {self.folder} fails for {item.url}: {error.strerror}; "
            "mend it, or give data.cache another folder, or off"
        )

    def drop(self, item: Item) -> None:
        """Forget a copy that turned out to be damaged."""
        (self.folder / item.name).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """The whole copies there are."""
        found = []
        with os.scandir(self.folder) as listing:
            for file in listing:
                if file.name.endswith(".shard"):
                    try:
                        status = file.stat()
                    except FileNotFoundError:  # evicted meanwhile
                        continue
                    found.append(Entry(file.name, status.st_size, status.st_mtime))
        return found

    def _share_of_the_disk(self) -> int:
        kept = sum(entry.bytes for entry in self.entries())
        return int(0.75 * (shutil.disk_usage(self.folder).free + kept))

    def _complete(self, item: Item, part: int, fill: Fill, victims: Victims) -> int:
        path = self._part(item)
        try:
            self._allocate(item, part, victims)
            with mmap.mmap(part, item.bytes) as pages, memoryview(pages) as view:
                fill(view)
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not a duplicate of `part`, which would keep its lock
            os.replace(path, self.folder / item.name)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return handle

    def _allocate(self, item: Item, part: int, victims: Victims) -> None:
        """Claim the disk's blocks before anything is mapped: a full disk is an error here and a crash later."""
        while True:
            try:
                os.posix_fallocate(part, 0, item.bytes)
                return
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
            with self._locked():
                going = list(victims(self.entries()))[:1]
                for entry in going:
                    self._evict(entry)
            if not going:
                free = shutil.disk_usage(self.folder).free
                raise UserError(
                    f"the disk of {self.folder} is full: {item.url} needs {item.bytes} bytes and {free} are free; "
                    "make room, or give data.cache another folder"
                )

    def _admit(self, item: Item, part: int, victims: Victims, wait: bool) -> bool:
        """Reserve the item's bytes, evicting what must go; False if there is no room and no waiting for it."""
        while True:
            with self._locked():
                used = self._on_their_way(item)  # counted first: what is finished meanwhile counts twice, not never
                entries = self.entries()
                used += sum(entry.bytes for entry in entries)
                for entry in victims(entries):
                    if used + item.bytes <= self.budget:
                        break
                    self._evict(entry)
                    used -= entry.bytes
                if used + item.bytes <= self.budget:
                    os.ftruncate(part, item.bytes)
                    return True
            if not wait:
                return False
            time.sleep(0.02)  # others' downloads fill the budget: they become entries that can go

    def _evict(self, entry: Entry) -> None:
        (self.folder / entry.name).unlink(missing_ok=True)
        count(evicted=1)

    def _on_their_way(self, mine: Item) -> int:
        """Bytes reserved by other processes' downloads; what the dead have left is removed."""
        total = 0
        for path in self.folder.glob("*.part"):
            if path == self._part(mine):
                continue
            try:
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is(handle, path):
                    path.unlink()
                fcntl.flock(handle, fcntl.LOCK_UN)
            except BlockingIOError:
                total += os.fstat(handle).st_size
            finally:
                os.close(handle)
        return total

    @contextmanager
    def _claim(self, item: Item, wait: bool) -> Iterator[int | None]:
        """The part file, open and locked; None where another holds it and there is no waiting."""
        handle = self._create(self._part(item))
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
            else:
                yield handle
        finally:
            _release(handle)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time counts, evicts and reserves."""
        handle = self._create(self.folder / ".budget")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _release(handle)

    @staticmethod
    def _create(path: Path) -> int:
        """Open a file of ours, in a folder that someone may have cleared meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, 0o644)

    def _part(self, item: Item) -> Path:
        return self.folder / f"{item.name}.part"

    @staticmethod
    def _is(handle: int, path: Path) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            return os.fstat(handle).st_ino == path.stat().st_ino
        except FileNotFoundError:
            return False


def _release(handle: int) -> None:
    """Unlock and close: a child forked meanwhile has the file open too, and closing alone would leave it locked."""
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
