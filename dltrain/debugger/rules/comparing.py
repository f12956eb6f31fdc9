"""Rules that compare: a run's first steps layer by layer, replicas with each other, and runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.histograms import quantile
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule, TensorRule
from dltrain.debugger.seen import Seen, Tensors, kind_of, shown
from dltrain.errors import UserError

if TYPE_CHECKING:
    from dltrain.debugger.run import SavedRun
    from dltrain.debugger.smdebug.run import ImportedRun


@dataclass
class PoorWeightInitialization(TensorRule):
    """In the first ``steps`` due steps: what activations are given varies more in one layer than in another by a factor
    above ``threshold``; or the middle 90 percent of a weight's gradients span less than ``distribution_range``; or the
    loss did not fall for ``patience`` due steps."""

    why: ClassVar = "Signals that grow or fade from layer to layer at the start make training slow or impossible."
    advice: ClassVar = "Take an initialisation made for the activation (He for ReLU, Glorot for tanh), or normalise."
    threshold: float = 10.0
    distribution_range: float = 0.001
    patience: int = 5
    steps: int = 10
    _looked: int = field(default=0, repr=False)
    _least: float = field(default=math.inf, repr=False)
    _since: int = field(default=0, repr=False)

    def needs(self) -> Needs:
        return Needs(histograms=frozenset({"gradients"}), activation_inputs=True)

    def look(self, seen: Seen, tensors: Tensors) -> Iterator[Finding]:
        self._looked += 1
        if self._looked > self.steps:
            return
        yield from self._variances(seen.step, tensors)
        yield from self._ranges(seen.step, tensors)
        self._since = 0 if seen.loss < self._least else self._since + 1
        self._least = min(self._least, seen.loss)
        if self._since >= self.patience:
            yield self.finding(
                seen.step, f"the loss did not fall in {self._since} due steps", ("loss",), loss=seen.loss
            )

    def _variances(self, step: int, tensors: Tensors) -> Iterator[Finding]:
        names, values = tensors.reduced("inputs", "variance")
        if len(names) > 1 and values.max() > self.threshold * max(values.min(), 1e-30):
            ends = names[int(values.argmax())], names[int(values.argmin())]
            what = f"{ends[0]} has variance {values.max():.3g}, and {ends[1]} has {values.min():.3g}"
            yield self.finding(step, what, ends, ratio=float(values.max() / max(values.min(), 1e-30)))

    def _ranges(self, step: int, tensors: Tensors) -> Iterator[Finding]:
        spans = {
            name: quantile(counts, 0.95) - quantile(counts, 0.05)
            for name, counts in tensors.counts.items()
            if kind_of(name) == "gradients" and not name.endswith("bias")
        }
        found = [name for name, span in spans.items() if span < self.distribution_range]
        if found:
            least = min(spans.values())
            what = f"the middle 90 % of {shown(found)} span less than {self.distribution_range:g}"
            yield self.finding(step, what, found, span=least)


@dataclass
class ReplicaDivergence(Rule):
    """Ranks that should hold the same weights, buffers or optimizer state do not, by checksum."""

    when: ClassVar = ("replicas",)
    why: ClassVar = "Replicas that differ train different models, and average their gradients all the same."
    advice: ClassVar = "Look for code that changes weights on some ranks alone, and at those hosts' memory."

    def needs(self) -> Needs:
        return Needs(replicas=True)

    def update(self, seen: Seen) -> Iterable[Finding]:
        fault = seen.observed["replicas"]
        return [self.finding(seen.step, fault)] if fault else ()


@dataclass
class SimilarAcrossRuns(TensorRule):
    """At least ``share`` percent of the tensors have the moments that they had in another run at the same step, to
    ``rtol``: what was changed between the runs has no effect. ``other_trials`` are runs' folders or URLs."""

    why: ClassVar = "Two runs that should differ are the same run."
    advice: ClassVar = "Look whether the setting or the data that were changed reach the training at all."
    other_trials: tuple[str, ...] = ()
    share: float = 100.0
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        if not self.other_trials:
            raise UserError("rule SimilarAcrossRuns needs other_trials, the folder or URL of another run")

    def look(self, seen: Seen, tensors: Tensors) -> Iterator[Finding]:
        for url, other in self._others.items():
            there = other.get(seen.step)
            if there is None:
                continue
            common = [name for name in tensors.index.names if name in there]
            mine = dict(zip(tensors.index.names, tensors.rows, strict=True))
            same = [name for name in common if np.allclose(mine[name], there[name], rtol=self.rtol, equal_nan=True)]
            if common and 100 * len(same) >= self.share * len(common):
                what = f"{len(same)} of {len(common)} tensors are those of {url}"
                yield self.finding(seen.step, what, (url,), tensors=float(len(same)))

    @cached_property
    def _others(self) -> dict[str, dict[int, dict[str, Array]]]:
        from dltrain.debugger.run import open_run  # which judges by rules

        return {url: _rows(open_run(url)) for url in self.other_trials}


def _rows(run: SavedRun | ImportedRun) -> dict[int, dict[str, Array]]:
    found: dict[int, dict[str, Array]] = {}
    for seen in run.history():
        if seen.tensors is not None:
            found[seen.step] = dict(zip(seen.tensors.index.names, seen.tensors.rows, strict=True))
    return found
