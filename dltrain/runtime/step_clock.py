"""Where the time of a step goes, part after part: marks that loop and engines set, and nothing but a comparison on
steps that nobody asked for.

    CLOCK.watch(policy.next, device)  # policy.next(step): the first step from this one on that is wanted
    CLOCK.begin(step)  # by the loop, before it waits for a batch
    CLOCK.mark("data_wait")  # what went by since the last mark was this
    CLOCK.taken()  # later: {50: {"data_wait": 0.001, "forward": ...}}

On a GPU marks are events on its stream: a part is what the device did, or waited, between two of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import torch

PARTS = (
    "data_wait",
    "forward",
    "backward",
    "communication",
    "pipeline",
    "optimizer",
    "hooks",
    "evaluation",
    "checkpoint",
)
"""Communication is what shows: not what goes on beside forward and backward passes. Pipeline is waiting for stages."""

NEVER = 1 << 62
"""A step that does not come."""

_Mark = tuple[str, "float | torch.cuda.Event"]


class StepClock:
    """One for a process: it trains one model at a time."""

    def __init__(self) -> None:
        self.on = False
        self._next = NEVER
        self._following: Callable[[int], int] = lambda step: NEVER
        self._cuda = False
        self._step = 0
        self._marks: list[_Mark] = []
        self._closed: deque[tuple[int, list[_Mark]]] = deque()

    def watch(self, following: Callable[[int], int], device: torch.device) -> None:
        """From now on, take the parts of wanted steps: ``following(step)`` is the first of them from that step on."""
        self.on, self._next, self._following, self._cuda = False, 0, following, device.type == "cuda"
        self._marks, self._closed = [], deque()

    def rest(self) -> None:
        """Take no more."""
        self.on, self._next = False, NEVER

    def begin(self, step: int) -> None:
        """A step begins, and the one before it ends."""
        if self.on:
            self._closed.append((self._step, self._marks))
            self.on = False
        if step >= self._next:
            self._next = self._following(step)
            self.on = self._next == step
            self._step, self._marks = step, [("", self._now())]
            self._next = self._following(step + 1)

    def mark(self, part: str) -> None:
        """The time since the last mark was that part's."""
        if self.on:
            self._marks.append((part, self._now()))

    def taken(self) -> dict[int, dict[str, float]]:
        """Seconds of each part by step, of the steps that have ended since last time; waits for the device to have
        passed them."""
        found: dict[int, dict[str, float]] = {}
        while self._closed:
            step, marks = self._closed.popleft()
            parts = dict.fromkeys(PARTS, 0.0)
            for (_, before), (part, after) in pairwise(marks):
                parts[part] += _between(before, after)
            found[step] = parts
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert not isinstance(before, float)
    assert not isinstance(after, float)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


CLOCK = StepClock()
"""This process's."""
