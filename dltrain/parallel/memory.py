"""The most bytes a rank has at one time in a step, from its rehearsal and from how its weights are kept.

The rehearsal tells, moment by moment, what activations take. On top of that lie weights, gradients and the optimizer's
state, which depend on who keeps what:

- one process: gradients come up one by one in the backward pass;
- DDP: the buckets, which are the gradients, are there all the time;
- FSDP2: shards of all three. A unit's weights are gathered into one buffer and copied out of it; in the forward pass
  that buffer stays until the next unit's is copied out, in the backward pass the next unit's is already there. Weights
  are given back behind the forward pass (ZeRO-3) or behind the backward pass, those outside of units always then. A
  unit's gradients are copied into a buffer in fp32, which stays until the next unit's; shards of one are copied, too;
- micro-batches: all whole gradients are there from the second on;
- a pipeline: what is kept between a piece's forward and backward pass, as often as the schedule holds pieces; gathered
  weights until a stage's last backward pass, and gradients from the first one on.

The step of the optimizer needs nothing beside: it is fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from dltrain.parallel.live import Mark
from dltrain.parallel.rehearsal import Rehearsed, Weight

FP32 = 4


@dataclass(frozen=True)
class Keeping:
    """How a rank keeps its weights: ``shards`` of FSDP2 (0: not by FSDP2), whether by DDP, whether gathered weights
    stay until the backward pass, bytes of an element that is computed with, states of the optimizer per weight."""

    shards: int
    ddp: bool
    stay: bool
    itemsize: int
    states: int

    def numel(self, weight: Weight) -> int:
        """Elements of a weight on the rank that has most."""
        if self.shards < 2 or not weight.shape:
            return weight.numel
        return -(-weight.shape[0] // self.shards) * prod(weight.shape[1:])


@dataclass(frozen=True)
class Sizes:
    """Bytes of some weights: as they are kept, their gradients and states; gathered, to compute with; the whole
    gradients in that format, and padded in fp32, to be reduced."""

    parameters: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    gathered: float = 0.0
    whole: float = 0.0
    reduced: float = 0.0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def sizes_of(weights: Sequence[Weight], keeping: Keeping) -> Sizes:
    """The sum over ``weights``."""
    return sum((_sizes(weight, keeping) for weight in weights), Sizes())


def _sizes(weight: Weight, keeping: Keeping) -> Sizes:
    kept, trained = keeping.numel(weight), float(weight.trained)
    padded = kept * max(1, keeping.shards)
    return Sizes(
        kept * weight.itemsize,
        trained * kept * weight.itemsize,
        trained * kept * FP32 * keeping.states,
        padded * keeping.itemsize if keeping.shards else 0.0,
        trained * weight.numel * keeping.itemsize,
        trained * padded * FP32,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what it keeps all the time, its activations at most, and everything at the worst moment."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    peak: float


def plain_memory(
    rehearsed: Rehearsed, units: Sequence[str], keeping: Keeping, pieces: Sequence[int], batch: float
) -> Memory:
    """Of a rank that has the whole model; ``pieces`` are samples of micro-batches, ``batch`` the bytes of all."""
    every = sizes_of(rehearsed.weights, keeping)
    marks = rehearsed.at(max(pieces))
    fixed = every.parameters + every.states + batch - marks[0].live
    accumulates = len(pieces) > 1
    if keeping.shards:
        grouped = _by_unit(rehearsed.weights, units, keeping)
        whole = {each.name: (unit_of(each.name, units), _sizes(each, keeping).whole) for each in rehearsed.weights}
        added = _under_fsdp(marks, grouped, whole, _Fsdp(grouped, keeping, accumulates), keeping.stay)
    elif keeping.ddp or accumulates:
        added = iter([(mark, every.gradients) for mark in marks])
    else:
        added = _one_by_one(marks, {weight.name: _sizes(weight, keeping).gradients for weight in rehearsed.weights})
    peak = fixed + max(mark.peak + more for mark, more in added)
    return Memory(every.parameters, every.gradients, every.states, max(mark.peak for mark in marks), peak)


def _one_by_one(marks: Sequence[Mark], gradients: Mapping[str, float]) -> Iterator[tuple[Mark, float]]:
    there = 0.0
    for mark in marks:
        yield mark, there
        if mark.kind == "gradient":
            there += gradients[mark.name]


def unit_of(name: str, units: Sequence[str]) -> str:
    """The innermost unit that a parameter belongs to; empty for the root."""
    return max((unit for unit in units if name.startswith(f"{unit}.")), key=len, default="")


def _by_unit(weights: Sequence[Weight], units: Sequence[str], keeping: Keeping) -> dict[str, Sizes]:
    found = dict.fromkeys(("", *units), Sizes())
    for weight in weights:
        found[unit_of(weight.name, units)] += _sizes(weight, keeping)
    return found


class _Fsdp:
    """What FSDP2 has beside the shards of weights and states."""

    def __init__(self, units: Mapping[str, Sizes], keeping: Keeping, accumulates: bool) -> None:
        self._units, self._keeping = units, keeping
        self._accumulates = accumulates
        self._buffers = keeping.shards > 1
        self.gathered: dict[str, float] = {}
        self.flat = self.reducing = self.shards = 0.0
        scale = FP32 / keeping.itemsize  # whole gradients of several pieces are added up in fp32
        self.whole = {name: each.whole * scale if accumulates else 0.0 for name, each in units.items()}

    @property
    def total(self) -> float:
        return sum(self.gathered.values()) + self.flat + self.reducing + self.shards + sum(self.whole.values())

    def gather(self, unit: str) -> None:
        """Into a buffer, and out of it."""
        if unit not in self.gathered:
            self.flat = self._units[unit].gathered if self._buffers else 0.0
            self.gathered[unit] = self._units[unit].gathered

    def ahead(self, unit: str | None) -> None:
        """The buffer of the next unit of the backward pass, if there is one to gather."""
        wanted = unit is not None and unit not in self.gathered and self._buffers
        self.flat = self._units[unit].gathered if wanted and unit is not None else 0.0

    def add(self, unit: str, number: float) -> None:
        if not self._accumulates:
            self.whole[unit] += number

    def reduce(self, unit: str) -> Iterator[float]:
        """The moments behind the backward pass of a unit."""
        self.gathered.pop(unit, None)
        self.reducing = self._units[unit].reduced
        yield self.total
        self.whole[unit] = 0.0
        self.shards += self._units[unit].gradients
        yield self.total


def _under_fsdp(
    marks: Sequence[Mark], units: Mapping[str, Sizes], whole: Mapping[str, tuple[str, float]], state: _Fsdp, stay: bool
) -> Iterator[tuple[Mark, float]]:
    order: list[str] = []
    state.gather("")
    for mark in marks:
        known = mark.name if mark.name in units else ""
        yield mark, state.total
        if known and mark.kind == "enter":
            state.gather(known)
            order.append(known)
        elif known and mark.kind == "leave" and not stay:
            state.gathered.pop(known)
        elif mark.kind == "loss":
            state.flat = 0.0
        elif known and mark.kind == "back":
            state.gather(known)
            yield _instant(mark), state.total
            before = order.index(known)
            state.ahead(order[before - 1] if before else None)
        elif mark.kind == "gradient":
            state.add(*whole[mark.name])
        elif known and mark.kind == "done":
            yield from ((_instant(mark), total) for total in state.reduce(known))
    for name in [*state.gathered]:  # the root, and units whose inputs need no gradient
        yield from ((_instant(marks[-1]), total) for total in state.reduce(name))


def _instant(mark: Mark) -> Mark:
    """The end of what the mark tells of."""
    return Mark(mark.kind, mark.name, mark.live, mark.live, 0.0, 0.0, 0.0, 0.0)
