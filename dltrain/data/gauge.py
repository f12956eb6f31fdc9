"""What the data cost, between two records: for the meter, ``metrics.jsonl`` and TensorBoard.

gauge = Gauge()
gauge.add(fetched.counts, samples=64)
record |= gauge.read()
"""

from __future__ import annotations

import time

from dltrain.storage.counters import Counts


class Gauge:
    """Counts of this rank and its workers, since the last reading."""

    def __init__(self) -> None:
        self.total = Counts()
        """Since the loader was made."""
        self._recent = Counts()
        self._samples = 0
        self._since = time.perf_counter()

    def add(self, counts: Counts, samples: int) -> None:
        """One batch, and what its samples took."""
        self.total += counts
        self._recent += counts
        self._samples += samples

    def read(self) -> dict[str, float]:
        """Rates since the last reading, which this one ends; those of the network only where there is one."""
        recent, elapsed = self._recent, max(time.perf_counter() - self._since, 1e-9)
        samples, reads = max(1, self._samples), recent.cache_hits + recent.cache_misses
        seen = {
            "data/read_ms": 1000 * recent.read_seconds / samples,
            "data/decode_ms": 1000 * recent.decode_seconds / samples,
        }
        if self.total.requests:
            seen["data/bytes_per_second"] = recent.bytes / elapsed
            seen["data/requests"] = recent.requests
            seen["data/retries"] = recent.retries
            seen["data/throttled"] = recent.throttled
        if self.total.cache_hits + self.total.cache_misses:
            seen["data/cache_hits"] = recent.cache_hits / max(1, reads)
            seen["data/evicted"] = recent.evicted
        if self.total.quarantined:
            seen["data/quarantined"] = self.total.quarantined
        self._recent, self._samples, self._since = Counts(), 0, time.perf_counter()
        return seen
