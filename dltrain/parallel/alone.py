"""A model as one rank of tensor, sequence or context parallelism has it, without the others.

Layers are as small as they are there, and where ranks would talk something of the same size stands in. It does what
``tensor.py`` and ``tokens.py`` do, hook by hook, and is for rehearsals: nothing that comes out means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dltrain.parallel.live import Log
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import splits_of
from dltrain.parallel.tokens import Role, refuse_indivisible, roles_of

_TOKENS = 1  # of [n, tokens, width]


@dataclass(frozen=True)
class Shares:
    """Into how many parts a rank's layers and tokens are cut; ``cast``: FSDP2 casts weights to bf16, not autocast.

    ``again`` is full or selective where units compute their activations again.
    """

    tp: int = 1
    cp: int = 1
    sequence: bool = False
    cast: bool = False
    again: str = ""


Move = Callable[[Tensor], Tensor]


class _Exchange(torch.autograd.Function):
    """One move forward and another one backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, there: Move, back: Move) -> Tensor:
        ctx.back = back
        return there(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


@dataclass(frozen=True)
class _Axis:
    """What ranks of an axis do with tensors, and the bytes that a ring sends for it from each of them."""

    name: str
    ranks: int
    log: Log
    along: int = _TOKENS

    def same(self, value: Tensor) -> Tensor:
        return value.view_as(value)

    def summed(self, value: Tensor) -> Tensor:
        self._send(2 * _bytes(value))
        return value.clone()

    def part(self, value: Tensor) -> Tensor:
        return value.chunk(self.ranks, self.along)[0].contiguous()

    def part_of_sum(self, value: Tensor) -> Tensor:
        self._send(_bytes(value))
        parts = [part.contiguous() for part in value.chunk(self.ranks, self.along)]
        return torch.empty_like(parts[0])

    def whole(self, value: Tensor) -> Tensor:
        self._send(_bytes(value) * self.ranks)
        return torch.cat([torch.empty_like(value) for _ in range(self.ranks)], self.along)

    def _send(self, number: float) -> None:
        self.log.send(self.name, number * (self.ranks - 1) / self.ranks)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def share_out(model: nn.Module, plan: Plan, shares: Shares, log: Log) -> None:
    """What ``split``, ``share_context`` and ``share_sequence`` do, for one rank alone; raises what they refuse."""
    splits = splits_of(model, plan, shares.tp) if shares.tp > 1 else []
    sequence = shares.sequence and shares.tp > 1
    shared = "parallel.sequence is on" if sequence else f"parallel.cp is {shares.cp}"
    roles = roles_of(model, plan, shared) if sequence or shares.cp > 1 else []
    tensor = _Axis("tensor", shares.tp, log)
    for each in splits:
        assert isinstance(each.layer, nn.Linear)
        _shrink(each.layer, each.style, shares.tp)
        if each.style == "row":
            moves = (tensor.part_of_sum, tensor.whole) if sequence else (tensor.summed, tensor.same)
            each.layer.register_forward_hook(partial(_after, moves))
        elif not sequence:
            each.layer.register_forward_pre_hook(partial(_before, (tensor.same, tensor.summed)))
    if shares.cp > 1:
        _share_context(roles, shares.cp, log)
    if sequence:
        _share_sequence(roles, tensor)


def _shrink(layer: nn.Linear, style: str, ranks: int) -> None:
    axis = 0 if style == "column" else 1
    for name, value in list(layer.named_parameters(recurse=False)):
        if value.dim() > axis:
            part = nn.Parameter(value.detach().chunk(ranks, axis)[0].clone(), value.requires_grad)
            setattr(layer, name, part)


def _share_context(roles: Sequence[Role], ranks: int, log: Log) -> None:
    tokens = _Axis("context", ranks, log)
    both = _Axis("context", ranks, log, along=3)
    for each in roles:
        if each.role == "deal":
            refuse = partial(refuse_indivisible, "parallel.cp", each.name, ranks=ranks)
            each.module.register_forward_hook(partial(_after, (tokens.part, _zeros_around(tokens)), refuse=refuse))
        elif each.role in ("attend", "dot_product"):  # gathered, which takes more memory than a ring
            each.module.register_forward_pre_hook(partial(_attend, both))
        elif each.role == "join":
            each.module.register_forward_pre_hook(partial(_before, (tokens.whole, tokens.part_of_sum)))


def _share_sequence(roles: Sequence[Role], tensor: _Axis) -> None:
    for each in roles:
        if each.role == "deal":
            refuse = partial(refuse_indivisible, "parallel.tp", each.name, ranks=tensor.ranks)
            each.module.register_forward_hook(partial(_after, (tensor.part, tensor.whole), refuse=refuse))
        elif each.role == "gather":
            moves = (tensor.whole, tensor.part_of_sum)
            each.module.register_forward_pre_hook(partial(_before, moves), prepend=True)
        elif each.role == "join":
            each.module.register_forward_pre_hook(partial(_before, (tensor.whole, tensor.part)), prepend=True)


def _zeros_around(axis: _Axis) -> Move:
    """The gradient of a part: as large as the whole, sent nowhere."""
    return lambda value: torch.cat([torch.empty_like(value) for _ in range(axis.ranks)], axis.along)


def _before(moves: tuple[Move, Move], module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return _exchanged(given[0], moves), *given[1:]


def _after(
    moves: tuple[Move, Move], module: nn.Module, given: Any, returned: Tensor, refuse: Callable[..., None] | None = None
) -> Tensor:
    if refuse is not None:
        refuse(tokens=returned)
    return _exchanged(returned, moves)


def _attend(axis: _Axis, module: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = given
    both = _exchanged(torch.stack([key, value]), (axis.whole, axis.part_of_sum))
    return query, both[0], both[1]


def _exchanged(value: Tensor, moves: tuple[Move, Move]) -> Tensor:
    moved: Tensor = _Exchange.apply(value, *moves)  # type: ignore[no-untyped-call]
    return moved
