"""The most bytes a rank of a pipeline has at one time: its share of the schedule, walked through action by action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dltrain.parallel.live import Mark
from dltrain.parallel.memory import Keeping, Memory, Sizes, sizes_of, unit_of
from dltrain.parallel.pipeline.channels import AHEAD
from dltrain.parallel.pipeline.schedule import Action, Schedule
from dltrain.parallel.rehearsal import Weight


@dataclass(frozen=True)
class Footprint:
    """Bytes of one piece in one stage: ``given`` to it, ``sent`` on by it; ``held`` between its forward and backward
    pass, with what goes in and out; at most in the ``forward`` and the ``backward`` pass, in the ``first`` with the
    gradients that come up; ``waiting``, what is kept more while gradients of weights wait. ``moved`` by ``kernels``,
    and sent to ranks that share layers (``tensor``) and tokens (``context``), in both passes."""

    given: float
    sent: float
    held: float
    forward: float
    backward: float
    first: float
    waiting: float
    moved: float
    kernels: float
    tensor: float
    context: float


def footprints(marks: Sequence[Mark], begins: Sequence[str], gradients: Mapping[str, float]) -> list[Footprint]:
    """Of stages that begin with these modules, the first with the model's inputs; ``gradients`` by parameter."""
    entered = {mark.name: place for place, mark in enumerate(marks) if mark.kind == "enter"}
    loss = next(place for place, mark in enumerate(marks) if mark.kind == "loss")
    done = {mark.name: place for place, mark in enumerate(marks) if mark.kind == "done"}
    inputs = next(place for place, mark in enumerate(marks) if mark.kind == "inputs")
    there = [inputs, *(entered[name] for name in begins), loss]
    back = [len(marks) - 1, *(done.get(name, len(marks) - 1) for name in begins), loss]
    given = [0.0, *(marks[entered[name]].given for name in begins), 0.0]
    return [
        _footprint(marks, there[stage : stage + 2], back[stage : stage + 2], given[stage : stage + 2], gradients)
        for stage in range(len(begins) + 1)
    ]


def _footprint(
    marks: Sequence[Mark],
    there: Sequence[int],
    back: Sequence[int],
    given: Sequence[float],
    gradients: Mapping[str, float],
) -> Footprint:
    forward, backward = marks[there[0] + 1 : there[1] + 1], marks[back[1] + 1 : back[0] + 1]
    before = marks[there[0]].live - given[0]
    first = up = 0.0
    for mark in backward:
        first = max(first, mark.peak - before + up)
        up += gradients[mark.name] if mark.kind == "gradient" else 0.0
    both = [*forward, *backward]
    return Footprint(
        given=given[0],
        sent=given[1],
        held=marks[there[1]].live - before,
        forward=max(mark.peak for mark in forward) - before,
        backward=max(mark.peak for mark in backward) - before,
        first=first,
        waiting=sum(mark.outputs for mark in forward),
        moved=sum(mark.moved for mark in both),
        kernels=sum(mark.kernels for mark in both),
        tensor=sum(mark.tensor for mark in both),
        context=sum(mark.context for mark in both),
    )


def pipeline_memory(
    schedule: Schedule, stages: Sequence[Footprint], weights: Sequence[Sequence[Weight]], units: Sequence[str],
    keeping: Keeping, batch: float,
) -> Memory:  # fmt: skip
    """Of the rank that needs most; ``weights`` by stage, ``batch`` the bytes of all samples and inputs."""
    ranks = [_rank_memory(row, schedule, stages, weights, units, keeping, batch) for row in schedule.actions]
    return max(ranks, key=lambda memory: memory.peak)


def _rank_memory(
    actions: Sequence[Action], schedule: Schedule, stages: Sequence[Footprint], weights: Sequence[Sequence[Weight]],
    units: Sequence[str], keeping: Keeping, batch: float,
) -> Memory:  # fmt: skip
    mine = sorted({action.stage for action in actions})
    sizes = {stage: sizes_of(weights[stage], keeping) for stage in mine}
    every = sum(sizes.values(), Sizes())
    walk = _Walk(actions, schedule, stages, sizes, bool(keeping.shards))
    activations = max(walk.activations) + batch
    fixed = every.parameters + every.states + batch
    running = fixed + max(walk.totals)
    reduced = [_reducing(weights[stage], units, keeping) for stage in mine] if keeping.shards else [0.0]
    last = fixed + every.gathered + every.reduced + max(reduced) if keeping.shards else 0.0
    return Memory(every.parameters, every.gradients, every.states, activations, max(running, last))


def _reducing(weights: Sequence[Weight], units: Sequence[str], keeping: Keeping) -> float:
    """When a stage's gradients are reduced: the largest buffer, less the gathered weights that it comes after."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(unit_of(weight.name, units), []).append(weight)
    found = [sizes_of(group, keeping) for group in groups.values()]
    return max((each.reduced - each.gathered for each in found), default=0.0)


class _Walk:
    """What activations take with each action, and what they take with gradients and gathered weights."""

    def __init__(
        self, actions: Sequence[Action], schedule: Schedule, stages: Sequence[Footprint], sizes: Mapping[int, Sizes],
        sharded: bool,
    ) -> None:  # fmt: skip
        self._stages, self._sizes, self._sharded = stages, sizes, sharded
        self._last = {action.stage: place for place, action in enumerate(actions)}
        self._held, self._gathered, self._gradients = 0.0, dict[int, float](), dict[int, float]()
        self.activations: list[float] = []
        self.totals: list[float] = []
        self._ahead = _ahead(schedule, actions)
        left = Counter((action.stage, action.kind == "F") for action in actions if action.kind != "W")
        for place, action in enumerate(actions):
            left[action.stage, action.kind == "F"] -= action.kind != "W"
            self._act(action, self._coming(left))
            if self._last[action.stage] == place and sharded:
                self._gathered[action.stage] = 0.0
                self._gradients[action.stage] = self._sizes[action.stage].gradients

    def _act(self, action: Action, coming: float) -> None:
        kind, stage, _ = action
        each = self._stages[stage]
        if kind == "F":
            self._gathered[stage] = self._sizes[stage].gathered
            self._note(self._held + each.forward + coming)
            self._held += each.held
            return
        if kind == "W":
            self._note(self._held + coming)
            self._held -= each.held + each.waiting
            return
        first = stage not in self._gradients
        if first and not self._sharded:
            self._note(self._held - each.held + each.first + coming)
        self._gradients[stage] = self._sizes[stage].reduced if self._sharded else self._sizes[stage].gradients
        if self._sharded or not first:
            self._note(self._held - each.held + each.backward + coming)
        self._held += each.waiting if kind == "I" else -each.held

    def _note(self, activations: float) -> None:
        self.activations.append(activations)
        self.totals.append(activations + sum(self._gathered.values()) + sum(self._gradients.values()))

    def _coming(self, left: Mapping[tuple[int, bool], int]) -> float:
        """Bytes of the transfers that have been asked for ahead of need."""
        coming = 0.0
        for stage in self._sizes:
            each, (above, below) = self._stages[stage], self._ahead[stage]
            coming += above * min(AHEAD, left[stage, True]) * each.given
            coming += below * min(AHEAD, left[stage, False]) * each.sent
        return coming


def _ahead(schedule: Schedule, actions: Sequence[Action]) -> dict[int, tuple[bool, bool]]:
    """By stage, whether other ranks send it activations and gradients."""
    owners, mine = schedule.owners, {action.stage for action in actions}
    return {
        stage: (stage > 0 and stage - 1 not in mine, stage + 1 < len(owners) and stage + 1 not in mine)
        for stage in mine
    }
