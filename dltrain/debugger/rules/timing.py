"""Rules about where the time goes: between steps, and in the parts of those that are timed, on each rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.rules.machine import summed_up
from dltrain.debugger.seen import Seen


@dataclass
class MaxInitializationTime(Rule):
    """The first step came more than ``threshold`` minutes after the process had started."""

    when: ClassVar = ("initialization",)
    why: ClassVar = "Nothing is trained meanwhile, and all of it is paid for."
    advice: ClassVar = "Look for downloads before training, and stream the data."
    threshold: float = 20.0

    def update(self, seen: Seen) -> Iterable[Finding]:
        minutes = seen.observed["initialization"] / 60
        if minutes <= self.threshold:
            return ()
        return [self.finding(seen.step, f"the first step came after {minutes:.1f} minutes", minutes=minutes)]


@dataclass
class StepOutlier(Rule):
    """More than ``n_outliers`` steps took longer than the mean by ``stddev`` standard deviations."""

    why: ClassVar = "Some steps wait for something that others do not."
    advice: ClassVar = "Look at what happens then: checkpoints, evaluations, shards that are fetched, other jobs."
    stddev: float = 3.0
    n_outliers: int = 10
    _before: float = field(default=0.0, repr=False)
    _count: int = field(default=0, repr=False)
    _mean: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)
    _outliers: list[int] = field(default_factory=list, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        before = 0.0 if "initialization" in seen.observed else self._before  # of a run that goes on
        self._before = 0.0 if seen.scores else seen.time
        if seen.scores or not before or len(self._outliers) > self.n_outliers:
            return None
        seconds = seen.time - before
        if self._count > self.n_outliers:
            deviation = math.sqrt(self._squares / self._count)
            if seconds > self._mean + self.stddev * deviation:
                self._outliers.append(seen.step)
                if len(self._outliers) <= self.n_outliers:
                    return ()
                what = f"{len(self._outliers)} of {self._count} steps took far longer than {self._mean:.3g} s, such as "
                return [self.finding(seen.step, what + f"step {seen.step} with {seconds:.3g} s", seconds=seconds)]
        self._count += 1  # Welford's sums, which outliers are kept out of
        change = seconds - self._mean
        self._mean += change / self._count
        self._squares += change * (seconds - self._mean)
        return ()


@dataclass
class _Timed(Rule):
    """Looks at the parts of timed steps; ``patience`` of them in a row must be wrong."""

    when: ClassVar = ("timeline",)
    patience: int = 3
    _times: int = field(default=0, repr=False)

    def needs(self) -> Needs:
        return Needs(timeline=True)

    def update(self, seen: Seen) -> Iterable[Finding]:
        timeline = seen.observed["timeline"]
        seconds = {part: np.array(values) for part, values in timeline["seconds"].items()}
        found = self.look(seen.step, seconds, timeline)
        self._times = self._times + 1 if found is not None else 0
        return [found] if found is not None and self._times >= self.patience else ()

    def look(self, step: int, seconds: dict[str, Array], timeline: dict[str, Any]) -> Finding | None:
        """What is wrong with a step, of which ``seconds`` are those of each rank by part."""
        raise NotImplementedError(f"{type(self).__name__} must say in look() what is wrong")


_BETWEEN = ("evaluation", "checkpoint")
"""Parts that come between steps."""


@dataclass
class DataWait(_Timed):
    """More than ``threshold`` percent of a step, and ``least`` seconds, go by waiting for a batch, on the rank that
    waits least."""

    why: ClassVar = "The loader is slower than the model."
    advice: ClassVar = "Raise data.workers, make samples cheaper to decode, or put the data nearer."
    threshold: float = 50.0
    least: float = 0.05

    def look(self, step: int, seconds: dict[str, Array], timeline: dict[str, Any]) -> Finding | None:
        waited = float(seconds["data_wait"].min())
        whole = sum(float(values.mean()) for part, values in seconds.items() if part not in _BETWEEN)
        percent = 100 * waited / max(whole, 1e-9)
        if waited < self.least or percent <= self.threshold:
            return None
        what = f"steps wait for data in {percent:.0f} % of their time ({waited:.3g} s)"
        return self.finding(step, what, percent=percent, seconds=waited)


_OWN = ("data_wait", "forward", "backward")
"""Parts in which a rank of data-parallel replicas waits for no other."""


@dataclass
class Straggler(_Timed):
    """The same rank takes longer than the median of the others by ``threshold`` percent, and by ``least`` seconds, for
    its data, its forward and its backward pass."""

    why: ClassVar = "All ranks wait for the slowest one in every step."
    advice: ClassVar = "Look at that rank's host: other jobs, heat, a slow disk; or at work on that rank alone."
    threshold: float = 30.0
    least: float = 0.05
    _rank: int = field(default=-1, repr=False)

    def look(self, step: int, seconds: dict[str, Array], timeline: dict[str, Any]) -> Finding | None:
        own = sum(seconds[part] for part in _OWN)
        assert not isinstance(own, int)
        if len(own) < 2 or seconds["pipeline"].any():
            return None
        rank = int(own.argmax())
        others = float(np.median(np.delete(own, rank)))
        behind = float(own[rank]) - others
        if rank != self._rank:
            self._rank, self._times = rank, 0
        if behind < self.least or 100 * behind <= self.threshold * others:
            return None
        parts = {part: float(seconds[part][rank] - np.median(np.delete(seconds[part], rank))) for part in _OWN}
        slow = max(parts, key=lambda part: parts[part])
        what = f"rank {rank} takes {own[rank]:.3g} s of its own for a step, the others {others:.3g} s; most in {slow}"
        return self.finding(step, what, (f"rank {rank}",), seconds=float(own[rank]), others=others)


@dataclass
class PipelineBubble(_Timed):
    """The ranks of a pipeline wait for each other in a share of the passes that is larger by ``threshold`` percentage
    points than their schedule's is."""

    why: ClassVar = "A schedule's share holds for stages of equal cost, and for passes that hide what is sent."
    advice: ClassVar = (
        "Move layers between stages (Plan.stages), take more micro-batches, or another parallel.schedule."
    )
    threshold: float = 10.0

    def look(self, step: int, seconds: dict[str, Array], timeline: dict[str, Any]) -> Finding | None:
        waited, expected = float(seconds["pipeline"].sum()), timeline.get("bubble")
        if expected is None or not waited:
            return None
        share = 100 * waited / (waited + float(seconds["forward"].sum() + seconds["backward"].sum()))
        if share <= 100 * expected + self.threshold:
            return None
        what = f"stages wait for each other in {share:.0f} % of their time, {100 * expected:.0f} % by the schedule"
        return self.finding(step, what, percent=share, expected=100 * expected)


@dataclass
class OverallFrameworkMetrics(Rule):
    """Never finds anything; :meth:`report` sums up where the time of timed steps went."""

    when: ClassVar = ("timeline",)
    why: ClassVar = "It is a summary."
    _parts: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def needs(self) -> Needs:
        return Needs(timeline=True)

    def update(self, seen: Seen) -> Iterable[Finding]:
        for part, values in seen.observed["timeline"]["seconds"].items():
            self._parts.setdefault(part, []).append(float(np.mean(values)))
        return ()

    def report(self) -> dict[str, dict[str, float]]:
        """Mean, median, 95th and 99th percentiles of the seconds of each part."""
        return {part: summed_up(values) for part, values in self._parts.items()}
