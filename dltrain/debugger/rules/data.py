"""Rules about the data: classes, labels, images and tokens, and which samples are never learnt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule, TensorRule
from dltrain.debugger.seen import Seen, Tensors, shown
from dltrain.errors import UserError


@dataclass
class ClassImbalance(Rule):
    """Of at least ``samples`` samples one class has more than ``threshold_imbalance`` times as many as another; or more
    than ``threshold_misprediction`` of a class are mispredicted in an evaluation.

    Labels are integer fields of the batch whose names contain ``labels_regex``.
    """

    when: ClassVar = ("tensors", "confusion")
    why: ClassVar = "A model learns to neglect what is rare."
    advice: ClassVar = "Weigh or repeat the samples of rare classes, and watch the recall of each class."
    threshold_imbalance: float = 10.0
    threshold_misprediction: float = 0.7
    samples: int = 500
    labels_regex: str = "cls|label|target"
    _uneven: list[Finding] = field(default_factory=list, repr=False)
    _missed: list[Finding] = field(default_factory=list, repr=False)

    def needs(self) -> Needs:
        return Needs(labels=(self.labels_regex,), confusion=True)

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is not None:
            self._uneven = list(self._counted(seen.step, seen.tensors))
        if "confusion" in seen.observed:
            self._missed = list(self._mispredicted(seen.step, **seen.observed["confusion"]))
        return [*self._uneven, *self._missed]

    def _mispredicted(self, step: int, matrix: list[list[float]], names: list[str]) -> Iterator[Finding]:
        counts = np.array(matrix)
        missed = 1 - counts.diagonal() / np.maximum(counts.sum(1), 1)
        wrong = (missed > self.threshold_misprediction) & (counts.sum(1) > 0)
        if counts.sum() >= self.samples and wrong.any():
            found = [f"class {names[place]}" for place in np.flatnonzero(wrong)]
            what = f"{missed[wrong].max():.0%} of {shown(found)} are mispredicted"
            yield self.finding(step, what, found, misprediction=float(missed[wrong].max()))

    def _counted(self, step: int, tensors: Tensors) -> Iterator[Finding]:
        names, most = tensors.reduced("labels", "max")
        least, total = tensors.reduced("labels", "min")[1], tensors.reduced("labels", "sum")[1]
        for name, high, low, samples in zip(names, most, least, total, strict=True):
            if samples >= self.samples and high > self.threshold_imbalance * max(low, 1):
                what = f"one class of {name.partition('/')[2]} has {high:.0f} samples and another {low:.0f}"
                yield self.finding(step, what, (name,), most=float(high), least=float(low))


@dataclass
class Confusion(Rule):
    """In an evaluation less than ``min_diag`` of a class are recognised, or more than ``max_off_diag`` of it are taken
    for one other class; of the first ``category_no`` classes, or of all."""

    when: ClassVar = ("confusion",)
    why: ClassVar = "A pair of classes is not told apart."
    advice: ClassVar = "Look at these samples and their labels; more of them, or a larger input, may help."
    category_no: int | None = None
    min_diag: float = 0.9
    max_off_diag: float = 0.1

    def needs(self) -> Needs:
        return Needs(confusion=True)

    def update(self, seen: Seen) -> Iterator[Finding]:
        confusion = seen.observed["confusion"]
        names = confusion["names"]
        matrix = np.array(confusion["matrix"], dtype=np.float64)[: self.category_no, : self.category_no]
        there = matrix.sum(1) > 0
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        low = there & (shares.diagonal() < self.min_diag)
        off = np.where(np.eye(len(shares), dtype=bool), 0.0, shares)
        for place in np.flatnonzero(low):
            other = int(off[place].argmax())
            pair = f", {off[place, other]:.0%} are taken for {names[other]}" if off[place, other] else ""
            what = f"{shares[place, place]:.0%} of class {names[place]} are recognised{pair}"
            yield self.finding(seen.step, what, (f"class {names[place]}",), recall=float(shares[place, place]))
        for place, other in zip(*np.nonzero((off > self.max_off_diag) & ~low[:, None]), strict=True):
            what = f"{off[place, other]:.0%} of class {names[place]} are taken for {names[other]}"
            yield self.finding(seen.step, what, (f"class {names[place]}",), confused=float(off[place, other]))


@dataclass
class CheckInputImages(TensorRule):
    """The mean of a channel of what the first layer was given on due steps so far, once these are at least
    ``threshold_samples`` images, is further from 0 than ``threshold_mean``."""

    why: ClassVar = "Inputs that are not centred make the first layer's gradients point one way."
    advice: ClassVar = "Subtract the mean and divide by the deviation of the training data, channel by channel."
    threshold_mean: float = 0.2
    threshold_samples: int = 500

    def needs(self) -> Needs:
        return Needs(first_input=True)

    def look(self, seen: Seen, tensors: Tensors) -> Iterator[Finding]:
        names, means = tensors.reduced("channels", "abs_max")
        images = tensors.reduced("images", "sum")[1]
        found = [*compress(names, (means > self.threshold_mean) & (images >= self.threshold_samples))]
        if found:
            what = f"a channel of {shown(name.partition('/')[2] for name in found)} has mean {float(means.max()):.3g}"
            yield self.finding(seen.step, what, found, mean=float(means.max()))


@dataclass
class NLPSequenceRatio(TensorRule):
    """A token of ``token_values`` is more than its percentage in ``token_thresholds_percent`` of what embeddings are
    given."""

    why: ClassVar = "Padding and unknown tokens cost as much as others and teach nothing."
    advice: ClassVar = "Sort or pack sequences by length, or widen the vocabulary."
    token_values: tuple[int, ...] = (0,)
    token_thresholds_percent: tuple[float, ...] = (50.0,)

    def __post_init__(self) -> None:
        if len(self.token_values) != len(self.token_thresholds_percent):
            raise UserError(
                "rule NLPSequenceRatio needs as many token_thresholds_percent as token_values, as in 0+1, 50+5"
            )

    def needs(self) -> Needs:
        return Needs(tokens=self.token_values)

    def look(self, seen: Seen, tensors: Tensors) -> Iterator[Finding]:
        names, shares = tensors.reduced("tokens", "mean")
        limits = dict(zip(self.token_values, self.token_thresholds_percent, strict=True))
        for name, share in zip(names, shares, strict=True):
            _, token, where = name.split("/", 2)
            if 100 * share > limits.get(int(token), 100.0):
                what = f"{share:.0%} of {where} is token {token}"
                yield self.finding(seen.step, what, (name,), percent=float(100 * share))


@dataclass
class LabelNoise(Rule):
    """At least ``least`` percent of the samples are predicted no better than by an untrained model, in ``patience``
    evaluations' time in a row, while the median loss has fallen to ``learnt`` of what it was at first.

    A sample's loss is that of the last time it was trained on; the untrained model's is that of the first step.
    """

    why: ClassVar = "What a model that has learnt the rest cannot learn is often mislabelled."
    advice: ClassVar = "Look at these samples (by key) and their labels; the worst come first."
    patience: int = 2
    least: float = 2.0
    learnt: float = 0.2
    most: int = 200
    """Keys that a finding names."""
    _start: float | None = field(default=None, repr=False)
    _bad: deque[set[str]] = field(default_factory=deque, repr=False)
    _losses: dict[str, float] = field(default_factory=dict, repr=False)
    _told: int = field(default=0, repr=False)

    def needs(self) -> Needs:
        return Needs(losses=True)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        if self._start is None and not seen.scores:
            self._start = seen.loss
        losses: dict[str, float] = seen.observed.get("losses") or {}
        if not losses or self._start is None:
            return None
        self._losses |= losses
        values = np.array(list(self._losses.values()))
        start = self._start
        self._bad.append({key for key, loss in self._losses.items() if loss >= start})
        if len(self._bad) > self.patience:
            self._bad.popleft()
        bad = set.intersection(*self._bad)
        learnt = float(np.median(values)) <= self.learnt * start
        if len(self._bad) < self.patience or not learnt or 100 * len(bad) < self.least * len(values):
            self._told = 0
            return ()
        if 2 * len(bad) <= 3 * self._told:
            return None  # more of the same
        self._told = len(bad)
        return [self._of(seen.step, bad, start, values)]

    def _of(self, step: int, bad: set[str], start: float, values: Array) -> Finding:
        worst = sorted(bad, key=lambda key: (-self._losses[key], key))
        many, median = f"{len(bad)} of {len(values)} samples", float(np.median(values))
        what = f"{many} keep a loss above {start:.3g}, where the median is {median:.2g}: {shown(worst)}"
        numbers = {"samples": float(len(bad)), "share": len(bad) / len(values)}
        return self.finding(step, what, worst[: self.most], **numbers)
