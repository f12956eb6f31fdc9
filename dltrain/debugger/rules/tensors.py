"""Rules about weights, gradients and updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.seen import Seen, shown


@dataclass
class VanishingGradient(Rule):
    """The mean of a gradient's absolute values is below ``threshold``.

    Biases are left out unless ``biases`` is true: before a norm, and in keys of attention, theirs are 0 by nature.
    """

    kinds: ClassVar = ("gradients",)
    why: ClassVar = "Layers whose gradients vanish do not learn."
    advice: ClassVar = "Try another initialisation, normalisation or activation, or residual connections."
    threshold: float = 1e-7
    biases: bool = False

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None:
            return
        names, means = seen.tensors.reduced("gradients", "abs_mean")
        below = np.flatnonzero(means < self.threshold)
        low = [int(place) for place in below if self.biases or not names[place].endswith("bias")]
        if low:
            least = float(means[low].min())
            wrong = [names[place] for place in low]
            what = f"gradients of {len(low)} of {len(names)} parameters are below {self.threshold:g} in the mean"
            yield self.finding(seen.step, f"{what}: {shown(wrong)}", wrong, abs_mean=least)


@dataclass
class ExplodingTensor(Rule):
    """A tensor has values that are NaN or infinite; with ``only_nan`` NaN alone, which sums of it show."""

    kinds: ClassVar = ("weights", "gradients", "updates")
    why: ClassVar = "What is computed with such values is lost."
    advice: ClassVar = "Lower optim.learning_rate, clip with optim.max_norm, or look for a division or logarithm of 0."
    only_nan: bool = False

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None:
            return
        for kind in seen.tensors.index.kinds:
            names, shares = seen.tensors.reduced(kind, "fraction_nonfinite")
            sums = seen.tensors.reduced(kind, "sum")[1]
            wrong = np.isnan(sums) if self.only_nan else shares > 0
            found = [names[place] for place in np.flatnonzero(wrong)]
            if found:
                what = f"values of {shown(found)} are not finite"
                yield self.finding(seen.step, what, found, fraction=float(shares[wrong].max()))


@dataclass
class WeightUpdateRatio(Rule):
    """A step changes a weight by more than ``large_threshold`` or less than ``small_threshold`` of its size (means of
    absolute values; ``epsilon`` is added to the size)."""

    kinds: ClassVar = ("weights", "updates")
    why: ClassVar = "Steps that are large beside the weights undo what was learnt; tiny ones learn nothing."
    advice: ClassVar = "Look at the learning rate of these parameters, their initial size, and weight decay."
    large_threshold: float = 10.0
    small_threshold: float = 1e-8
    epsilon: float = 1e-9

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None or not seen.learning_rate:
            return
        names, updates = seen.tensors.reduced("updates", "abs_mean")
        sizes = dict(zip(*seen.tensors.reduced("weights", "abs_mean"), strict=True))
        with np.errstate(invalid="ignore"):  # what is not finite is ExplodingTensor's
            ratios = updates / np.array([sizes[name.removeprefix("update/")] + self.epsilon for name in names])
        for wrong, word in ((ratios > self.large_threshold, "large"), (ratios < self.small_threshold, "small")):
            found = [names[place].removeprefix("update/") for place in np.flatnonzero(wrong)]
            if found:
                extreme = float(ratios[wrong].max() if word == "large" else ratios[wrong].min())
                what = f"updates of {shown(found)} are {word} beside the weights (ratio {extreme:.3g})"
                yield self.finding(seen.step, what, found, ratio=extreme)


@dataclass
class AllZero(Rule):
    """At least ``threshold`` percent of a tensor's values are 0."""

    kinds: ClassVar = ("weights", "gradients")
    why: ClassVar = "Nothing passes through it, or nothing comes back."
    advice: ClassVar = "Look for dead activations, a frozen path, or a mask that covers everything."
    threshold: float = 100.0
    collection_names: tuple[str, ...] = ("gradients",)

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None:
            return
        for kind in self.collection_names:
            names, shares = seen.tensors.reduced(kind, "fraction_zero")
            found = [names[place] for place in np.flatnonzero(100 * shares >= self.threshold)]
            if found:
                what = f"at least {self.threshold:g} % of {shown(found)} is 0"
                yield self.finding(seen.step, what, found, fraction=float(shares.max()))


@dataclass
class TensorVariance(Rule):
    """The variance of a tensor of ``collection_names`` is above ``max_threshold`` or below ``min_threshold``."""

    kinds: ClassVar = ("weights", "gradients")
    why: ClassVar = "Large variances come before values that overflow; small ones mean that neurons do the same."
    advice: ClassVar = "Look at the initialisation and at the learning rate."
    max_threshold: float | None = None
    min_threshold: float | None = None
    collection_names: tuple[str, ...] = ("weights",)

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None:
            return
        for kind in self.collection_names:
            names, variances = seen.tensors.reduced(kind, "variance")
            above = np.zeros(len(names), bool) if self.max_threshold is None else variances > self.max_threshold
            below = np.zeros(len(names), bool) if self.min_threshold is None else variances < self.min_threshold
            for wrong, word in ((above, "large"), (below, "small")):
                found = [names[place] for place in np.flatnonzero(wrong)]
                if found:
                    what = f"the variance of {shown(found)} is {word}"
                    yield self.finding(seen.step, what, found, variance=float(variances[wrong][0]))


@dataclass
class UnchangedTensor(Rule):
    """A trained weight's moments are the same, as ``numpy.allclose`` has it, at the last ``num_steps`` due steps."""

    kinds: ClassVar = ("weights", "updates")
    why: ClassVar = "It is trained, by its setting, and does not learn."
    advice: ClassVar = "Freeze it (optim.frozen), or look why no gradient comes to it."
    num_steps: int = 3
    rtol: float = 1e-5
    atol: float = 1e-8
    _rows: deque[Array] = field(default_factory=deque, repr=False)

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.tensors is None or not seen.learning_rate:
            return
        names, places = seen.tensors.index.of("weights")
        trained = {name.removeprefix("update/") for name in seen.tensors.index.of("updates")[0]}
        self._rows.append(seen.tensors.rows[places])
        if len(self._rows) < self.num_steps:
            return
        same = self._rows[0][:, 0] > 0
        for before, after in zip(self._rows, list(self._rows)[1:], strict=False):
            same &= np.isclose(before, after, rtol=self.rtol, atol=self.atol).all(1)
        self._rows.popleft()
        found = [name for name, is_same in zip(names, same, strict=True) if is_same and name in trained]
        if found:
            yield self.finding(seen.step, f"{shown(found)} did not change in {self.num_steps} due steps", found)
