"""The learning rate as a function of the step: a linear warm-up, then cosine (Loshchilov and Hutter, 2017), a factor
at each milestone, or constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dltrain.config import Schedule
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


def build_schedule(schedule: Schedule, peak: float, total: int, samples: int, global_batch_size: int) -> LearningRate:
    """Turn lengths into steps for a run of ``total`` steps. Raises :class:`UserError` when the warm-up is longer."""
    warmup = schedule.warmup.steps(samples, global_batch_size)
    if total and warmup > total:
        raise UserError(
            f"schedule.warmup {schedule.warmup} is {warmup} steps, longer than the run's {total}; shorten it too"
        )
    milestones = tuple(length.steps(samples, global_batch_size) for length in schedule.milestones)
    return LearningRate(peak, schedule.name, total, warmup, schedule.final, milestones, schedule.gamma)
