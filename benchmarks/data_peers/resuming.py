"""Timing a resume: from the moment all worker processes are up to the first batch.

Starting processes and importing torch in them takes seconds and has nothing to do with finding a position, so workers
wait for each other and leave the time at which all were there. The clock is the system's, one for all processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0


@dataclass(frozen=True)
class Stamp:
    """Waits in ``folder`` until all ``workers`` are there: call it in each, or let it be unpickled there."""

    folder: str
    workers: int

    def __call__(self, worker: int = 0) -> None:
        mine = Path(self.folder) / f"ready-{os.getpid()}"
        mine.touch()
        deadline = time.monotonic() + PATIENCE
        while len(list(mine.parent.glob("ready-*"))) < self.workers and time.monotonic() < deadline:
            time.sleep(0.001)
        mine.write_text(repr(time.monotonic()))


def timed_resume(scratch: str, workers: int, first_batch: Callable[[Stamp], Any]) -> dict[str, Any]:
    """Seconds until ``first_batch`` returned: since all workers were up, and since it was called."""
    for path in Path(scratch).glob("ready-*"):
        path.unlink()
    started = time.monotonic()
    first_batch(Stamp(scratch, workers))
    ended = time.monotonic()
    ready = max((float(path.read_text()) for path in Path(scratch).glob("ready-*")), default=started)
    return {"seconds": ended - ready, "seconds_with_workers_start": ended - started}


def skip(batches: Iterator[Any], count: int) -> Any:
    """The batch after ``count`` others."""
    for _ in range(count):
        next(batches)
    return next(batches)
