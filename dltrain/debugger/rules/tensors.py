"""Rules about weights, gradients and updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import compress
from typing import ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import TensorRule
from dltrain.debugger.seen import Seen, Tensors, shown
from dltrain.debugger.selection import STATES
from dltrain.errors import UserError, nearest


def update_ratios(tensors: Tensors, epsilon: float) -> tuple[list[str], Array]:
    """Parameters whose weights and updates there are, and mean |update| / (mean |weight| + epsilon) of each."""
    sizes = dict(zip(*tensors.reduced("weights", "abs_mean"), strict=True))
    updates = zip(*tensors.reduced("updates", "abs_mean"), strict=True)
    both = {name.removeprefix("update/"): value for name, value in updates if name.removeprefix("update/") in sizes}
    with np.errstate(invalid="ignore"):  # what is not finite is ExplodingTensor's
        ratios = np.array(list(both.values())) / (np.array([sizes[name] for name in both]) + epsilon)
    return list(both), ratios


KINDS = (
    "weights",
    "gradients",
    "updates",
    "activations",
    "inputs",
    *(name for some in STATES.values() for name in some),
)
"""Collections that rules may be told to look at."""


def _check(names: Iterable[str], rule: str) -> None:
    for name in names:
        if name not in KINDS:
            raise UserError(f"collection_names of rule {rule} has {name!r}, which there is not; {nearest(name, KINDS)}")


class _Peak:
    """Whether a learning rate has decayed so far that nothing is meant to move."""

    def __init__(self) -> None:
        self._peak = 0.0

    def rests(self, rate: float) -> bool:
        self._peak = max(self._peak, rate)
        return rate < RESTS * self._peak or not rate


RESTS = 0.05
"""Share of the largest learning rate below which small steps are what the schedule wants."""


@dataclass
class VanishingGradient(TensorRule):
    """The mean of a gradient's absolute values is below ``threshold``.

    Biases are left out unless ``biases`` is true: before a norm, and in keys of attention, theirs are 0 by nature.
    """

    why: ClassVar = "Layers whose gradients vanish do not learn."
    advice: ClassVar = "Try another initialisation, normalisation or activation, or residual connections."
    threshold: float = 1e-7
    biases: bool = False

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        names, means = tensors.reduced("gradients", "abs_mean")
        below = np.flatnonzero(means < self.threshold)
        low = [int(place) for place in below if self.biases or not names[place].endswith("bias")]
        if low:
            least = float(means[low].min())
            wrong = [names[place] for place in low]
            what = f"gradients of {len(low)} of {len(names)} parameters are below {self.threshold:g} in the mean"
            yield self.finding(seen.step, f"{what}: {shown(wrong)}", wrong, abs_mean=least)


@dataclass
class ExplodingTensor(TensorRule):
    """A tensor has values that are NaN or infinite; with ``only_nan`` NaN alone, which sums of it show."""

    why: ClassVar = "What is computed with such values is lost."
    advice: ClassVar = "Lower optim.learning_rate, clip with optim.max_norm, or look for a division or logarithm of 0."
    only_nan: bool = False

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        for kind in tensors.index.kinds:
            names, shares = tensors.reduced(kind, "fraction_nonfinite")
            sums = tensors.reduced(kind, "sum")[1]
            wrong = np.isnan(sums) if self.only_nan else shares > 0
            found = [*compress(names, wrong)]
            if found:
                what = f"values of {shown(found)} are not finite"
                yield self.finding(seen.step, what, found, fraction=float(shares[wrong].max()))


@dataclass
class WeightUpdateRatio(TensorRule):
    """A step changes a weight by more than ``large_threshold`` or less than ``small_threshold`` of its size (means of
    absolute values; ``epsilon`` is added to the size)."""

    why: ClassVar = "Steps that are large beside the weights undo what was learnt; tiny ones learn nothing."
    advice: ClassVar = "Look at the learning rate of these parameters, their initial size, and weight decay."
    large_threshold: float = 10.0
    small_threshold: float = 1e-8
    epsilon: float = 1e-9
    _peak: _Peak = field(default_factory=_Peak, repr=False)

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        rests = self._peak.rests(seen.learning_rate)
        names, ratios = update_ratios(tensors, self.epsilon)
        small = (ratios < self.small_threshold) & (not rests)
        for wrong, word in ((ratios > self.large_threshold, "large"), (small, "small")):
            found = [*compress(names, wrong)]
            if found:
                extreme = float(ratios[wrong].max() if word == "large" else ratios[wrong].min())
                what = f"updates of {shown(found)} are {word} beside the weights (ratio {extreme:.3g})"
                yield self.finding(seen.step, what, found, ratio=extreme)


@dataclass
class UnevenUpdates(TensorRule):
    """At ``patience`` due steps in a row the mean size of a weight's update is ``factor`` times the median of all
    weights', and at least ``least`` of the weight's own. Biases are left out: they begin at 0."""

    why: ClassVar = "A layer whose steps are far larger than the others' forgets at each what it has learnt before."
    advice: ClassVar = "Look at the learning rate of this layer (groups, hooks on gradients) and at its initial size."
    factor: float = 100.0
    least: float = 0.01
    patience: int = 2
    epsilon: float = 1e-9
    _times: dict[str, int] = field(default_factory=dict, repr=False)

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        ratios = dict(zip(*update_ratios(tensors, self.epsilon), strict=True))
        updates = zip(*tensors.reduced("updates", "abs_mean"), strict=True)
        sizes = {name.removeprefix("update/"): size for name, size in updates if not name.endswith("bias")}
        sizes = {name: size for name, size in sizes.items() if name in ratios}
        if len(sizes) < 3:
            return
        median = float(np.median(list(sizes.values())))
        wrong = [n for n, size in sizes.items() if size > self.factor * median and ratios[n] > self.least]
        self._times = {name: self._times.get(name, 0) + 1 for name in wrong}
        found = [name for name, times in self._times.items() if times >= self.patience]
        if found:
            largest = max(float(sizes[name]) for name in found)
            what = f"updates of {shown(found)} are {largest:.3g} in the mean, and the median weight's {median:.3g}"
            yield self.finding(seen.step, what, found, update=largest, median=median)


@dataclass
class AllZero(TensorRule):
    """At least ``threshold`` percent of a tensor's values are 0."""

    why: ClassVar = "Nothing passes through it, or nothing comes back."
    advice: ClassVar = "Look for dead activations, a frozen path, or a mask that covers everything."
    threshold: float = 100.0
    collection_names: tuple[str, ...] = ("gradients",)

    def __post_init__(self) -> None:
        _check(self.collection_names, "AllZero")

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        for kind in self.collection_names:
            names, shares = tensors.reduced(kind, "fraction_zero")
            found = [*compress(names, 100 * shares >= self.threshold)]
            if found:
                what = f"at least {self.threshold:g} % of {shown(found)} is 0"
                yield self.finding(seen.step, what, found, fraction=float(shares.max()))


@dataclass
class TensorVariance(TensorRule):
    """The variance of a tensor of ``collection_names`` is above ``max_threshold`` or below ``min_threshold``."""

    why: ClassVar = "Large variances come before values that overflow; small ones mean that neurons do the same."
    advice: ClassVar = "Look at the initialisation and at the learning rate."
    max_threshold: float | None = None
    min_threshold: float | None = None
    collection_names: tuple[str, ...] = ("weights",)

    def __post_init__(self) -> None:
        _check(self.collection_names, "TensorVariance")

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        for kind in self.collection_names:
            names, variances = tensors.reduced(kind, "variance")
            above = np.zeros(len(names), bool) if self.max_threshold is None else variances > self.max_threshold
            below = np.zeros(len(names), bool) if self.min_threshold is None else variances < self.min_threshold
            for wrong, word in ((above, "large"), (below, "small")):
                found = [*compress(names, wrong)]
                if found:
                    what = f"the variance of {shown(found)} is {word}"
                    yield self.finding(seen.step, what, found, variance=float(variances[wrong][0]))


@dataclass
class UnchangedTensor(TensorRule):
    """A trained weight's moments are the same, as ``numpy.allclose`` has it, at the last ``num_steps`` due steps."""

    why: ClassVar = "It is trained, by its setting, and does not learn."
    advice: ClassVar = "Freeze it (optim.frozen), or look why no gradient comes to it."
    num_steps: int = 3
    rtol: float = 1e-5
    atol: float = 1e-8
    _rows: deque[Array] = field(default_factory=deque, repr=False)
    _peak: _Peak = field(default_factory=_Peak, repr=False)

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        if self._peak.rests(seen.learning_rate):
            self._rows.clear()
            return
        names, places = tensors.index.of("weights")
        trained = {name.removeprefix("update/") for name in tensors.index.of("updates")[0]}
        self._rows.append(tensors.rows[places])
        if len(self._rows) < self.num_steps:
            return
        same = self._rows[0][:, 0] > 0
        for before, after in zip(self._rows, list(self._rows)[1:], strict=False):
            same &= np.isclose(before, after, rtol=self.rtol, atol=self.atol).all(1)
        self._rows.popleft()
        found = [name for name in compress(names, same) if name in trained]
        if found:
            yield self.finding(seen.step, f"{shown(found)} did not change in {self.num_steps} due steps", found)
