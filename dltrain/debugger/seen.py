"""What rules are shown of a run, live and afterwards alike: each step, tensors where they were due, and scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dltrain.debugger.reductions import Array, reduce


class Index:
    """Which tensors there are: their names by kind ("weights", "gradients", "updates", "exp_avg", ...)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        places: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            places.setdefault(kind_of(name), []).append(place)
        self._places = {kind: np.array(some) for kind, some in places.items()}

    def of(self, kind: str) -> tuple[list[str], np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Names of a kind, and their rows."""
        places = self._places.get(kind, np.array([], dtype=np.int64))
        return [self.names[place] for place in places], places

    @cached_property
    def kinds(self) -> list[str]:
        return list(self._places)


_KINDS = {"gradient": "gradients", "update": "updates"}
_OF_A_MODULE = re.compile(r"_(in|out)put_\d+$")


def kind_of(name: str) -> str:
    """Of a tensor by its name: what stands before the slash, "weights" where there is none, and of what modules return
    and take in "activations" and "inputs"."""
    before, slash, _ = name.partition("/")
    if slash:
        return _KINDS.get(before, before)
    match = _OF_A_MODULE.search(name)
    return "weights" if match is None else "activations" if match[1] == "out" else "inputs"


@dataclass(frozen=True)
class Tensors:
    """Moments of all tensors at one step: float64 [tensors, 9], in the order of the index."""

    index: Index
    rows: Array
    counts: Mapping[str, Array] = field(default_factory=dict)
    """Of tensors with histograms, float64 [BINS] by name."""

    def reduced(self, kind: str, reduction: str) -> tuple[list[str], Array]:
        """Names of the tensors of a kind, and one number of each; tensors without elements are left out."""
        names, places = self.index.of(kind)
        rows = self.rows[places]
        there = rows[:, 0] > 0
        return [name for name, is_there in zip(names, there, strict=True) if is_there], reduce(reduction, rows[there])


NO_SCORES: Mapping[str, float] = {}
NOT_OBSERVED: Mapping[str, Any] = {}


class Seen(NamedTuple):
    """One step: ``norm`` is the global gradient norm before clipping, ``loss_scale`` 0 but in fp16, ``clip``
    what clipping multiplies gradients by, ``time`` seconds;
    ``tensors`` only where statistics were due, ``scores`` only of an evaluation after the step. ``observed`` is by kind
    what rules asked for or a profiler saw (:mod:`dltrain.debugger.observing`)."""

    step: int
    time: float = 0.0
    loss: float = 0.0
    norm: float = 0.0
    learning_rate: float = 0.0
    loss_scale: float = 0.0
    clip: float = 1.0
    tensors: Tensors | None = None
    scores: Mapping[str, float] = NO_SCORES
    observed: Mapping[str, Any] = NOT_OBSERVED


def shown(names: Iterable[str], most: int = 3) -> str:
    """Some names in a sentence."""
    some = list(names)
    more = f" and {len(some) - most} more" if len(some) > most else ""
    return ", ".join(some[:most]) + more


def numbered(steps: Sequence[int], most: int = 8) -> str:
    """Some steps in a sentence."""
    if not steps:
        return "none"
    return ", ".join(map(str, steps[:most])) + (f", ... {steps[-1]}" if len(steps) > most else "")
