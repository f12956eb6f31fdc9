"""Where the time goes: samples per second and the share of time spent waiting for data."""

from __future__ import annotations

import time


class Meter:
    """Counts between two readings. Times are wall-clock seconds of this rank."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, as after a pause that is not training."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._samples = 0
        self._steps = 0

    def add(self, waited: float, samples: int) -> None:
        """One step: seconds waited for its batch, and its samples over all ranks."""
        self._waited += waited
        self._samples += samples
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Rates since the last reading, which this one ends."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rates = {
            "samples_per_second": self._samples / elapsed,
            "step_seconds": elapsed / max(1, self._steps),
            "data_wait": self._waited / elapsed,
        }
        self.restart()
        return rates
