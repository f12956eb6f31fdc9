"""How often something slow may be done: so that it takes a small share of the run's time, however long the run is.

pace = Pace()
if pace.allows():
    with pace.timed():
        draw()
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_SHARE = 0.02
"""Of the time."""

_GUESS = 1.0
"""Seconds that the first time is thought to take."""


class Pace:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._took, self._since = _GUESS, time.monotonic()

    def allows(self) -> bool:
        """Whether enough time has passed since the last time."""
        return (time.monotonic() - self._since) * _SHARE >= self._took

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within, it is done."""
        began = time.monotonic()
        yield
        self._since = time.monotonic()
        self._took = self._since - began
