"""Requests to stop: SIGTERM (spot interruption, a scheduler), Ctrl-C, a deadline, a file, a parent that has died.

A signal's handler only sets a flag. The loop looks at a step boundary and the ranks agree on when to stop, so that all
of them save the same step. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from dltrain.config import Run

ONE_PRESS = 1.0
"""Seconds within which signals count as one: a launcher may hand on what the terminal has sent already."""

LOOK_EVERY = 1.0
"""Seconds between looks at the clock, the file and the parent."""

STARTED = "DLTRAIN_STARTED"
"""Variable that says when the job began, in seconds of the epoch: deadlines count from there."""

ORPHANED = "the process that started it has ended"
"""Why a process stops that is left by itself."""

MARGIN = 5.0
"""Seconds before a deadline that are left beside what a stop has been seen to cost."""


class StopFlag:
    """Why this process was asked to stop; empty until it is.

    ``run`` gives the deadline and the file; without it signals alone count. So many ``generations`` of processes above
    this one are to stay: its parent, where that is a launcher, and the launcher's own, where a job ends with that.
    """

    def __init__(self, run: Run | None = None, generations: int = 0) -> None:
        self.reason = ""
        self._first = 0.0
        self._next = 0.0
        self._generations = generations
        self._parents = _parents(generations)
        self._parent = os.getppid()
        self._file = Path(run.stop_file) if run is not None and run.stop_file else None
        began = float(os.environ.get(STARTED) or time.time())
        self._deadline = began + run.deadline.seconds if run is not None and run.deadline else 0.0
        self._deadline_said = "" if run is None else str(run.deadline)

    def __bool__(self) -> bool:
        return bool(self.reason)

    def look(self, cost: float) -> bool:
        """Whether it is time to stop, where that takes about ``cost`` seconds; looks beside signals now and then."""
        if self.reason:
            return True
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_EVERY
            self.reason = self._found(cost)
        return bool(self.reason)

    def _found(self, cost: float) -> str:
        if self._parents and _parents(self._generations) != self._parents:
            return ORPHANED
        if self._file is not None and self._file.exists():
            return f"run.stop_file {self._file} is there"
        if self._deadline and time.time() + cost + MARGIN >= self._deadline:
            return f"run.deadline {self._deadline_said} is near"
        return ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.reason:
            self._first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > ONE_PRESS:
            raise KeyboardInterrupt
        orphaned = self._generations > 0 and os.getppid() != self._parent  # then the signal is the kernel's word of it
        self.reason = ORPHANED if orphaned else signal.Signals(number).name


def _parents(generations: int) -> tuple[int, ...]:
    """Numbers of the processes above this one, the nearest first."""
    found: tuple[int, ...] = ()
    try:
        while len(found) < generations:
            found = (*found, os.getppid() if not found else psutil.Process(found[-1]).ppid())
    except psutil.Error:
        return (*found, 0)  # it is ending at this moment
    return found


@contextmanager
def stop_flag(run: Run | None = None, generations: int = 0) -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT while the body runs."""
    flag = StopFlag(run, generations)
    before = {number: signal.signal(number, flag.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
