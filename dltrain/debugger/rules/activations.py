"""Rules about what modules return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.seen import Seen, shown


@dataclass
class DeadRelu(Rule):
    """More than ``threshold_layer`` percent of a ReLU's units are positive in less than 1 percent of their elements."""

    kinds: ClassVar = ("active",)
    why: ClassVar = "Dead units pass nothing on and no gradient back, so they stay dead."
    advice: ClassVar = "Lower optim.learning_rate, look at the biases before them, or take GELU or LeakyReLU."
    threshold_layer: float = 50.0

    def update(self, seen: Seen) -> Iterable[Finding]:
        yield from _idle(self, seen, "active", "dead")


@dataclass
class SaturatedActivation(Rule):
    """More than ``threshold_layer`` percent of a tanh's or sigmoid's units have inputs beyond -9.5 to 9.5, or -23 to
    17, in more than 99 percent of their elements."""

    kinds: ClassVar = ("unsaturated",)
    why: ClassVar = "Where an activation is flat no gradient comes back."
    advice: ClassVar = "Normalise what goes in, make initial weights smaller, or take another activation."
    threshold_layer: float = 50.0

    def update(self, seen: Seen) -> Iterable[Finding]:
        yield from _idle(self, seen, "unsaturated", "saturated")


def _idle(rule: DeadRelu | SaturatedActivation, seen: Seen, kind: str, word: str) -> Iterable[Finding]:
    if seen.tensors is None:
        return
    names, shares = seen.tensors.reduced(kind, "fraction_zero")
    wrong = 100 * shares > rule.threshold_layer
    found = [names[place].partition("/")[2] for place in np.flatnonzero(wrong)]
    if found:
        most = float(shares[wrong].max())
        yield rule.finding(seen.step, f"up to {most:.0%} of the units of {shown(found)} are {word}", found, share=most)
