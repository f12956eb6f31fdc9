"""Rules about losses, scores and the scale of fp16."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import pstdev
from typing import ClassVar

from dltrain.debugger.findings import Finding
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.seen import Seen


class _Mean:
    """Of what was added since it was taken last."""

    def __init__(self) -> None:
        self.count, self._sum = 0, 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self._sum += value

    def take(self) -> float:
        mean = self._sum / self.count
        self.count, self._sum = 0, 0.0
        return mean


@dataclass
class LossNotDecreasing(Rule):
    """The loss, a mean over ``num_steps`` steps, fell by less than ``diff_percent`` from one such mean to the next, or
    rose by more than ``increase_threshold_percent``."""

    why: ClassVar = "The model learns nothing more."
    advice: ClassVar = "Try another optim.learning_rate, look at the labels, or end the run."
    num_steps: int = 10
    diff_percent: float = 0.1
    increase_threshold_percent: float = 5.0
    _losses: _Mean = field(default_factory=_Mean, repr=False)
    _before: float = field(default=math.nan, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        if seen.scores:
            return None
        self._losses.add(seen.loss)
        if self._losses.count < self.num_steps:
            return None
        mean, before = self._losses.take(), self._before
        self._before = mean
        if not math.isfinite(mean):
            return [self.finding(seen.step, "the loss is not finite", loss=mean)]
        if not math.isfinite(before) or not before:
            return ()
        fell = 100 * (before - mean) / abs(before)
        if fell < -self.increase_threshold_percent:
            return [self.finding(seen.step, f"the loss rose by {-fell:.3g} % in {self.num_steps} steps", percent=fell)]
        elif fell < self.diff_percent:
            return [self.finding(seen.step, f"the loss fell by {fell:.3g} % in {self.num_steps} steps", percent=fell)]
        return ()


@dataclass
class LossSpike(Rule):
    """A loss lies more than ``deviations`` standard deviations above the mean of the last ``window`` steps, by at least
    half of that mean and ``least`` of the first loss."""

    why: ClassVar = "A spike comes from a few samples or from steps that are too large, and may not heal."
    advice: ClassVar = "Look at the samples of this step, clip with optim.max_norm, or lower optim.learning_rate."
    deviations: float = 6.0
    window: int = 50
    least: float = 0.05
    _first: float | None = field(default=None, repr=False)
    _losses: deque[float] = field(default_factory=deque, repr=False)
    _sum: float = field(default=0.0, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        if seen.scores or not math.isfinite(seen.loss):
            return None
        losses, loss = self._losses, seen.loss
        if self._first is None:
            self._first = abs(loss)
        if len(losses) == self.window:
            mean = self._sum / self.window
            far = loss > 1.5 * mean and loss > mean + self.least * self._first
            if far and loss > mean + self.deviations * pstdev(losses):  # which takes its time
                what = f"the loss is {loss:.4g}, after {mean:.4g} in the mean of {self.window} steps"
                # the spike is no measure for what follows
                return [self.finding(seen.step, what, loss=loss, mean=mean)]
            self._sum -= losses.popleft()
        losses.append(loss)
        self._sum += loss
        return ()


@dataclass
class Overfit(Rule):
    """The held-out loss is above the training loss by more than ``ratio_threshold`` of it, and ``least`` of the first
    loss, at ``patience`` evaluations in a row; the training loss is the mean since the evaluation before."""

    why: ClassVar = "The model learns the training samples by heart."
    advice: ClassVar = "Try more data, augmentation, weight decay or dropout, a smaller model, or end the run earlier."
    start_step: int = 0
    patience: int = 1
    ratio_threshold: float = 0.1
    least: float = 0.0
    _first: float | None = field(default=None, repr=False)
    _losses: _Mean = field(default_factory=_Mean, repr=False)
    _times: int = field(default=0, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        if not seen.scores:
            self._losses.add(seen.loss)
            if self._first is None:
                self._first = abs(seen.loss)
            return None
        if "loss" not in seen.scores or self._first is None or not self._losses.count or seen.step < self.start_step:
            return ()
        train, held_out = self._losses.take(), seen.scores["loss"]
        ratio = (held_out - train) / train if train else 0.0
        apart = not self.least or held_out - train >= self.least * self._first
        wrong = ratio > self.ratio_threshold and apart
        self._times = self._times + 1 if wrong else 0
        if self._times >= self.patience:
            what = f"the held-out loss is {held_out:.4g}, and the training loss {train:.4g}"
            return [self.finding(seen.step, what, ratio=ratio)]
        return ()


@dataclass
class Overtraining(Rule):
    """No new least loss in training for ``patience_train`` evaluations, and of the held-out samples none for
    ``patience_validation``, by more than ``delta``."""

    why: ClassVar = "Training on costs time and may make the model worse."
    advice: ClassVar = "End the run; the best checkpoint is kept."
    patience_train: int = 5
    patience_validation: int = 10
    delta: float = 0.01
    _losses: _Mean = field(default_factory=_Mean, repr=False)
    _best: dict[str, float] = field(default_factory=dict, repr=False)
    _since: dict[str, int] = field(default_factory=dict, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        if not seen.scores:
            self._losses.add(seen.loss)
            return None
        if "loss" not in seen.scores or not self._losses.count:
            return ()
        train = self._losses.take()
        self._note("training", train)
        self._note("held-out", seen.scores["loss"])
        if self._since["training"] >= self.patience_train and self._since["held-out"] >= self.patience_validation:
            since = self._since["held-out"]
            return [self.finding(seen.step, f"no better loss for {since} evaluations", evaluations=float(since))]
        return ()

    def _note(self, which: str, loss: float) -> None:
        better = loss < self._best.get(which, math.inf) - self.delta
        self._since[which] = 0 if better else self._since.get(which, 0) + 1
        if better:
            self._best[which] = loss


@dataclass
class StalledTrainingRule(Rule):
    """Between two steps more than ``threshold`` seconds went by."""

    why: ClassVar = "Something waits: for data, for a rank, or for a disk."
    advice: ClassVar = "Look at data_wait in metrics.jsonl, and at the other ranks' logs."
    threshold: float = 1800.0
    _before: float = field(default=0.0, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        before = 0.0 if "initialization" in seen.observed else self._before  # of a run that goes on
        self._before = seen.time
        waited = seen.time - before
        if before and waited > self.threshold:
            return [self.finding(seen.step, f"the step came {waited:.0f} s after the one before", seconds=waited)]
        return ()


@dataclass
class LossScaleCollapse(Rule):
    """The loss scale of fp16 fell below ``threshold``, or to 1 / ``fall`` of its largest."""

    why: ClassVar = "Gradients overflow again and again, and their steps are skipped."
    advice: ClassVar = "Set precision.compute bf16, or lower optim.learning_rate."
    threshold: float = 16.0
    fall: float = 4096.0
    _largest: float = field(default=0.0, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        scale = seen.loss_scale
        if seen.scores or not scale:
            return None
        self._largest = max(self._largest, scale)
        if scale < max(self.threshold, self._largest / self.fall):
            return [self.finding(seen.step, f"the loss scale is {scale:g}, and was {self._largest:g}", scale=scale)]
        return ()
