"""On which steps something is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dltrain.config import Collection, Debugger
from dltrain.runtime.step_clock import NEVER


@dataclass(frozen=True)
class Policy:
    """The first step and every multiple of ``every`` in [start, end), 0 for no end; or ``steps`` alone, if given."""

    every: int
    start: int = 0
    end: int = 0
    steps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: Debugger, collection: Collection | None = None) -> Policy:
        """As the config says; what a collection leaves out is the debugger's."""
        own = collection or Collection()
        every, steps = own.every or settings.every, own.steps or (() if own.every else settings.steps)
        return cls(int(every.value), own.start or settings.start, own.end or settings.end, frozenset(steps))

    @classmethod
    def often(cls, settings: Debugger) -> Policy:
        """The debugger's; where collections alone have steps, that of the one that is due most often."""
        own = [cls.of(settings, each) for each in settings.collections.values() if each.every]
        return (
            cls.of(settings) if settings.every or settings.steps or not own else min(own, key=lambda each: each.every)
        )

    def due(self, step: int) -> bool:
        """Whether it is on this step, counted from 1."""
        return self.next(step) == step

    def next(self, step: int) -> int:
        """The first step from this one on that it is on; :data:`NEVER` where there is none."""
        if self.steps:
            return min((each for each in self.steps if each >= step), default=NEVER)
        first = max(1, self.start)
        if step <= first:
            found = first
        else:
            found = -(-step // self.every) * self.every if self.every else NEVER
        return NEVER if not self.every or (self.end and found >= self.end) else found


def first_due(policies: Iterable[Policy], step: int) -> int:
    """The first step from this one on that any of them is on."""
    return min((policy.next(step) for policy in policies), default=NEVER)
