"""Rules about what modules return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from typing import ClassVar

from dltrain.debugger.findings import Finding
from dltrain.debugger.rules.base import TensorRule
from dltrain.debugger.seen import Seen, Tensors, shown


@dataclass
class _Idle(TensorRule):
    """More than ``threshold_layer`` percent of a module's units do nothing."""

    kind: ClassVar[str]
    """Of tensors with the share of each unit's elements that do something, 0 below 1 percent."""
    word: ClassVar[str]
    threshold_layer: float = 50.0

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        names, shares = tensors.reduced(self.kind, "fraction_zero")
        wrong = 100 * shares > self.threshold_layer
        found = [name.partition("/")[2] for name in compress(names, wrong)]
        if found:
            most = float(shares[wrong].max())
            what = f"up to {most:.0%} of the units of {shown(found)} are {self.word}"
            yield self.finding(seen.step, what, found, share=most)


@dataclass
class DeadRelu(_Idle):
    """More than ``threshold_layer`` percent of a ReLU's units are positive in less than 1 percent of their elements."""

    kind: ClassVar = "active"
    word: ClassVar = "dead"
    why: ClassVar = "Dead units pass nothing on and no gradient back, so they stay dead."
    advice: ClassVar = "Lower optim.learning_rate, look at the biases before them, or take GELU or LeakyReLU."


@dataclass
class SaturatedActivation(_Idle):
    """More than ``threshold_layer`` percent of a tanh's or sigmoid's units have inputs beyond -9.5 to 9.5, or -23 to
    17, in more than 99 percent of their elements."""

    kind: ClassVar = "unsaturated"
    word: ClassVar = "saturated"
    why: ClassVar = "Where an activation is flat no gradient comes back."
    advice: ClassVar = "Normalise what goes in, make initial weights smaller, or take another activation."
