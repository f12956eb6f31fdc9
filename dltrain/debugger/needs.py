"""What rules want to be looked at beyond what the config says: each rule says so itself, and nothing is looked at that
nobody needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class Needs:
    """Of one rule, or of several put together by ``|``."""

    histograms: frozenset[str] = frozenset()
    """Kinds of tensors whose values are counted in bins."""
    activation_inputs: bool = False
    """What activation modules take in."""
    first_input: bool = False
    """What the first layer is given, channel by channel."""
    tokens: tuple[int, ...] = ()
    """How often embeddings are given these."""
    labels: tuple[str, ...] = ()
    """How many samples each class has, in integer fields whose names contain one of these expressions."""
    losses: bool = False
    """The loss of each sample, by key."""
    confusion: bool = False
    """The confusion matrix of evaluations."""
    replicas: bool = False
    """Whether ranks that should hold the same do; it waits for the device."""
    timeline: bool = False
    """The parts of steps, on each rank."""
    system: bool = False
    """What the machine does meanwhile."""

    def __or__(self, other: Needs) -> Needs:
        both: dict[str, Any] = {}
        for each in fields(self):
            both[each.name] = _both(getattr(self, each.name), getattr(other, each.name))
        return Needs(**both)


def all_of(needs: Iterable[Needs]) -> Needs:
    """Put together."""
    return reduce(Needs.__or__, needs, Needs())


def _both(mine: object, theirs: object) -> object:
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return tuple(dict.fromkeys((*mine, *theirs)))
    if isinstance(mine, frozenset) and isinstance(theirs, frozenset):
        return mine | theirs
    return mine or theirs
