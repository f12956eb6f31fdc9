"""What this process has asked of remote stores, counted since it started.

before = counters.snapshot()
storage.read("s3://bucket/key")
print(counters.snapshot() - before)
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Counts:
    """Counts of one process, or differences and sums of them."""

    requests: int = 0
    """GETs sent."""
    bytes: int = 0
    """Bytes received."""
    retries: int = 0
    """GETs sent again, or continued after a cut."""
    throttled: int = 0
    """Answers that asked for fewer requests."""
    cache_hits: int = 0
    """Reads of a shard that found it on the node."""
    cache_misses: int = 0
    """Reads of a shard that had to wait for it, or asked for ranges of it."""
    evicted: int = 0
    """Shards removed from the node's cache."""
    quarantined: int = 0
    """Bad samples replaced by others."""
    read_seconds: float = 0.0
    """Spent reading samples, waiting for shards included."""
    decode_seconds: float = 0.0
    """Spent decoding and augmenting."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Counts)))


_lock = threading.Lock()
_total: dict[str, float] = {}


def _renew_lock() -> None:
    """In a forked child: another thread may have held the lock at the fork."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def count(**amounts: float) -> None:
    """Add to this process's counts."""
    with _lock:
        for name, amount in amounts.items():
            _total[name] = _total.get(name, 0) + amount


def snapshot() -> Counts:
    """The counts so far."""
    with _lock:
        return Counts(**_total)  # type: ignore[arg-type]  # counts are whole numbers, seconds are not
