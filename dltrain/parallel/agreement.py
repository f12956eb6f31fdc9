"""Whether ranks that should hold the same do: parameters and buffers, learning rates, tied weights.

A rank whose memory or network erred goes on as if nothing were, and its replicas drift apart. Each rank sums the bit
patterns of its shards on the device, and the sums' least and largest are compared along every axis of the mesh that a
tensor is not split on (the idea is nanotron's ``sanity_checks.py``).

    agreement = Agreement(model, optimizer, mesh)
    agreement.fault()  # "" where all is well
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain.mesh import Mesh
from dltrain.parallel.pieces import AXES, local_of, split_on

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Held:
    """A tensor as this rank has it, and the axes along which ranks have parts of it."""

    what: str
    local: Tensor
    split_on: frozenset[str]


class Agreement:
    """Of the ranks that share a part of ``model``, over all axes but the pipeline's."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, mesh: Mesh) -> None:
        self._held = list(_held(model))
        self._optimizer, self._mesh = optimizer, mesh
        groups = {axis: mesh.axis_group(axis) for axis in AXES}
        self._groups = {axis: group for axis, group in groups.items() if group is not None}

    def fault(self) -> str:
        """What is not the same, and on which ranks; empty where nothing is. Collective; waits for the device."""
        if not self._groups:
            return ""
        sums = self._sums()
        apart = torch.zeros_like(sums, dtype=torch.bool)
        for axis, group in self._groups.items():
            shared = torch.tensor([axis not in split_on for _, split_on in self._entries()], device=sums.device)
            apart |= shared & _differs(sums, group)
        found = apart.any().int()
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return self._told(sums.tolist(), apart.tolist()) if found.item() else ""

    def _entries(self) -> list[tuple[str, frozenset[str]]]:
        """What is compared, in the order of :meth:`_sums`."""
        tensors = [(each.what, each.split_on) for each in self._held]
        return [("the learning rate", frozenset()), *tensors]

    @torch.no_grad()
    def _sums(self) -> Tensor:
        """Of bit patterns, int64, one for each entry; they wrap around."""
        rates = torch.tensor([float(group["lr"]) for group in self._optimizer.param_groups], dtype=torch.float64)
        sums = [_sum_of_bits(each.local) for each in self._held]
        device = sums[0].device if sums else rates.device
        return torch.stack([_sum_of_bits(rates).to(device), *sums])

    def _told(self, sums: Sequence[int], apart: Sequence[bool]) -> str:
        """The first fault in the order of the model, as a sentence; collective."""
        entries, rank = self._entries(), dist.get_rank()
        first = next(((self._mesh.pp_rank, place) for place, is_apart in enumerate(apart) if is_apart), None)
        part, place = min(each for each in _gathered(first) if each is not None)
        mine = None
        if part == self._mesh.pp_rank:
            what, split_on = entries[place]
            mine = (what, tuple(self._mesh.place_on(axis) for axis in sorted(split_on)), sums[place], rank)
        holders = [each for each in _gathered(mine) if each is not None]
        return f"{holders[0][0]} is not the same on ranks that should have it equal: {_who(holders)}"


def _held(model: nn.Module) -> Iterator[_Held]:
    named = [(f"parameter {name}", value) for name, value in model.named_parameters()]
    named += [(f"buffer {name}", value) for name, value in model.named_buffers()]  # type: ignore[misc]
    for what, value in named:
        yield _Held(what, local_of(value), split_on(value))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.view(_SAME_SIZE[tensor.element_size()]).sum(dtype=torch.int64)


def _differs(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Which of the sums are not the same on all ranks of the group."""
    both = torch.cat([sums, ~sums])  # the largest complement is the complement of the least
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    largest, complement = both.chunk(2)
    return largest != ~complement


def _who(holders: Sequence[tuple[str, tuple[int, ...], int, int]]) -> str:
    """Which ranks depart from the others, among the first that hold the same part and differ."""
    parts: dict[tuple[int, ...], dict[int, int]] = {}
    for _, part, value, rank in holders:
        parts.setdefault(part, {})[rank] = value
    ranks = next(some for some in parts.values() if len(set(some.values())) > 1)
    (usual, number), *others = Counter(ranks.values()).most_common()
    if number == others[0][1]:  # as many here as there: nobody can tell who is right
        return f"{_listed(list(ranks))} differ"
    odd = [rank for rank, value in ranks.items() if value != usual]
    rest = [rank for rank, value in ranks.items() if value == usual]
    return f"{_listed(odd)} {'departs' if len(odd) == 1 else 'depart'} from {_listed(rest)}"


def _listed(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
