"""The learning rate as a function of the step: a linear warm-up, then cosine (Loshchilov and Hutter, 2017), a factor
at each milestone, or constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dltrain.config import Length, Schedule
from dltrain.errors import UserError


@dataclass(frozen=True)
class LearningRate:
    """Resolved to steps; ``at(step)`` is the learning rate of the optimizer step with that number, from 0."""

    peak: float
    name: str
    total: int
    warmup: int
    final: float
    milestones: tuple[int, ...]
    gamma: float

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.name == "step":
            return self.peak * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if self.name == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.peak * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)


def build_schedule(schedule: Schedule, peak: float, total: int, steps_of: Callable[[Length], int]) -> LearningRate:
    """Turn lengths into steps, by ``steps_of``, for a run of ``total`` steps (0 where that is not known).

    Raises :class:`UserError` when the warm-up is longer than the run.
    """
    warmup = steps_of(schedule.warmup)
    if total and warmup > total:
        raise UserError(
            f"schedule.warmup {schedule.warmup} is {warmup} steps, longer than the run's {total}; shorten it too"
        )
    milestones = tuple(map(steps_of, schedule.milestones))
    return LearningRate(peak, schedule.name, total, warmup, schedule.final, milestones, schedule.gamma)
