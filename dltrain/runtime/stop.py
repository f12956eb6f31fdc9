"""Requests to stop: SIGTERM (spot interruption, a scheduler) and Ctrl-C.

The handler only sets a flag. The loop reads it at a step boundary and the ranks agree on when to stop, so that all of
them save the same step. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_PRESS = 1.0
"""Seconds within which signals count as one: a launcher may hand on what the terminal has sent already."""


class StopFlag:
    """Why this process was asked to stop; empty until it is."""

    def __init__(self) -> None:
        self.reason = ""
        self._first = 0.0

    def __bool__(self) -> bool:
        return bool(self.reason)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.reason:
            self._first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > ONE_PRESS:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT while the body runs."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
