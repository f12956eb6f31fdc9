"""Tensors on their way from stage to stage.

A channel leads from one rank to another and carries either activations or gradients. What goes through it, and in which
order, both ends know from the schedule; the receiver asks for the next two transfers ahead of need. On GPUs each kind
of channel has a communicator of its own: NCCL works one communicator's transfers off in turn, and two ranks that both
send first would wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.parallel.pipeline.schedule import Schedule

AHEAD = 2

Cargo = Literal["activations", "gradients"]


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor before it comes."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=device)


Values = tuple[Tensor, ...]
_Item = tuple[Cargo, int, int]  # cargo, the stage it is for, piece


class Wires:
    """The communicators of one pipeline: one for each cargo and direction; collective over its ranks."""

    def __init__(self, axis: dist.ProcessGroup, device: torch.device) -> None:
        self.ranks = dist.get_process_group_ranks(axis)
        self.place = self.ranks.index(dist.get_rank())
        self.axis, self.device = axis, device
        kinds = [(cargo, down) for cargo in ("activations", "gradients") for down in (True, False)]
        self._groups = dict.fromkeys(kinds, axis)
        if device.type == "cuda":
            self._groups = {kind: _twin(self.ranks) for kind in kinds}

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        return list(self._groups.values())

    def send(self, tensor: Tensor, cargo: Cargo, to: int, tag: int) -> dist.Work | None:
        return dist.isend(tensor, self.ranks[to], self._groups[cargo, to > self.place], tag)

    def receive(self, tensor: Tensor, cargo: Cargo, source: int, tag: int) -> dist.Work | None:
        return dist.irecv(tensor, self.ranks[source], self._groups[cargo, source < self.place], tag)


def _twin(ranks: Sequence[int]) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


class Channels:
    """The transfers of one run through a schedule, as one rank sees them.

    ``shapes`` are those of the activations that each stage but the first is given; gradients have the same, for the
    floating-point ones.
    """

    def __init__(self, schedule: Schedule, wires: Wires, shapes: Sequence[Sequence[Shape]]) -> None:
        self._schedule, self._wires, self._shapes = schedule, wires, shapes
        self._coming = {
            (source, cargo): [item for item in self._sent(source) if item[0] == cargo]
            for source in set(schedule.owners) - {wires.place}
            for cargo in ("activations", "gradients")
        }
        self._here: dict[_Item, list[tuple[Tensor, dist.Work | None]]] = {}
        self._leaving: list[tuple[Tensor, dist.Work]] = []

    def send(self, cargo: Cargo, stage: int, piece: int, values: Values) -> None:
        """Send off what ``stage`` needs; the tensors must not change until :meth:`finish`."""
        self._leaving = [(tensor, work) for tensor, work in self._leaving if not work.is_completed()]
        to = self._schedule.owners[stage]
        for place, value in enumerate(values):
            tensor = value.contiguous()
            work = self._wires.send(tensor, cargo, to, self._tag(cargo, stage, piece, place))
            if work is not None:
                self._leaving.append((tensor, work))

    def receive(self, cargo: Cargo, stage: int, piece: int) -> Values:
        """What another rank has sent for ``stage``; waits for it."""
        source = self._schedule.owners[stage - 1 if cargo == "activations" else stage + 1]
        coming, wanted = self._coming[source, cargo], (cargo, stage, piece)
        while coming and (wanted not in self._here or self._asked(source, cargo) < AHEAD + 1):
            self._ask(source, coming.pop(0))
        pairs = self._here.pop(wanted)
        for _, work in pairs:
            if work is not None:
                work.wait()
        return tuple(tensor for tensor, _ in pairs)

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        for _, work in self._leaving:
            work.wait()
        self._leaving.clear()

    def _ask(self, source: int, item: _Item) -> None:
        cargo, stage, piece = item
        self._here[item] = []
        for place, shape in enumerate(self.shapes(cargo, stage)):
            tensor = shape.empty(self._wires.device)
            work = self._wires.receive(tensor, cargo, source, self._tag(cargo, stage, piece, place))
            self._here[item].append((tensor, work))

    def shapes(self, cargo: Cargo, stage: int) -> list[Shape]:
        """Of what ``stage`` is sent."""
        if cargo == "activations":
            return list(self._shapes[stage])
        return [shape for shape in self._shapes[stage + 1] if shape.dtype.is_floating_point]

    def _asked(self, source: int, cargo: Cargo) -> int:
        """Transfers that have been asked for and not taken."""
        behind = {"activations": -1, "gradients": 1}[cargo]
        return sum(kind == cargo and self._schedule.owners[stage + behind] == source for kind, stage, _ in self._here)

    def _sent(self, source: int) -> list[_Item]:
        """What ``source`` sends here, in its order."""
        items: list[_Item] = []
        owners, here = self._schedule.owners, self._wires.place
        for kind, stage, piece in self._schedule.actions[source]:
            if kind == "F" and stage + 1 < len(owners) and owners[stage + 1] == here:
                items.append(("activations", stage + 1, piece))
            if kind in ("B", "I") and stage and owners[stage - 1] == here:
                items.append(("gradients", stage - 1, piece))
        return items

    def _tag(self, cargo: Cargo, stage: int, piece: int, place: int) -> int:
        """One for each tensor, where the backend looks at it: gloo's transfers may then overtake each other."""
        number = (cargo == "gradients") * self._schedule.stages + stage
        return (number * self._schedule.pieces + piece) * 16 + place
