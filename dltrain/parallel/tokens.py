"""Ranks that keep a part of the tokens of the same samples each.

Sequence parallelism (Korthikanti et al., "Reducing Activation Recomputation", 2022) goes with split layers: between
them, what every rank would hold and compute in full, norms and residual sums, is shared out. The sum behind a row layer
becomes a reduce-scatter, and a gather stands before the next column layers: as many bytes.

Context parallelism shares out the tokens of the whole model: each rank's queries attend to keys and values of all,
gathered at once, or one rank's after the other (``ring.py``). Its ranks are replicas to whoever averages gradients,
each having seen other tokens; so the gradient of what is joined is that of every rank at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn import functional as F

from dltrain.errors import UserError, nearest
from dltrain.parallel.plan import Plan, matching
from dltrain.parallel.ring import ring_attention, takes
from dltrain.parallel.tensor import Split

_ROLES = ("deal", "each", "gather", "attend", "dot_product", "join")
_TOKENS = 1  # of [n, tokens, width]
_TOKENS_BY_HEADS = 2  # of [n, heads, tokens, width]


@dataclass(frozen=True)
class Role:
    """A module and what it does with tokens, as in ``Plan.tokens``."""

    name: str
    module: nn.Module
    role: str


def roles_of(model: nn.Module, plan: Plan, setting: str) -> list[Role]:
    """What the plan says of tokens; nothing is changed. Raises :class:`UserError`, naming the ``setting`` that asks."""
    if not plan.tokens:
        raise UserError(
            f"{setting}, and the plan of {type(model).__name__} does not say where tokens are dealt out, attended to "
            "and joined; name the modules in Plan(tokens={...}), or leave it"
        )
    found = []
    for pattern, role in plan.tokens.items():
        if role not in _ROLES:
            raise UserError(f"the plan says that {pattern!r} does {role!r} with tokens; {nearest(role, _ROLES)}")
        found += [Role(name, module, role) for name, module in matching(model, pattern, bare=True).items()]
    _refuse_incomplete(model, {each.role for each in found}, setting)
    return found


def _refuse_incomplete(model: nn.Module, roles: set[str], setting: str) -> None:
    wanted: dict[str, tuple[str, ...]] = {"deals them out": ("deal",), "joins them": ("join",)}
    if "cp" in setting:
        wanted["looks at all of them"] = ("attend", "dot_product")
    for does, names in wanted.items():
        if not roles & set(names):
            raise UserError(
                f"{setting}, and Plan(tokens={{...}}) of {type(model).__name__} names no module that {does}; give one "
                f"the role {' or '.join(map(repr, names))}"
            )


def refuse_ungathered(model: nn.Module, splits: Iterable[Split], roles: Iterable[Role]) -> None:
    """Raises :class:`UserError` for a column that would be given a part of the tokens."""
    given_all = {module for each in roles if each.role == "gather" for module in each.module.modules()}
    names = {module: name for name, module in model.named_modules()}
    for each in splits:
        if each.style == "column" and each.layer not in given_all:
            raise UserError(
                f"parallel.sequence is on, and {names[each.layer]} of {type(model).__name__}, a column, is in no "
                "module with the role 'gather', so that it would see a part of the tokens alone; give one that it is "
                "in that role in Plan(tokens={...})"
            )


def share_context(roles: Iterable[Role], group: dist.ProcessGroup, attention: str) -> None:
    """Context parallelism, in place: tokens are dealt out, keys and values gathered or passed on, tokens joined.

    ``attention`` is ``parallel.cp_attention``. Raises :class:`UserError` for a ring that a module cannot do.
    """
    for each in roles:
        if each.role == "deal":
            each.module.register_forward_hook(_Deal(each.name, group))
        elif each.role in ("attend", "dot_product"):
            if _goes_round(each, attention):
                each.module.forward = _Ring(each.module.forward, group, required=attention == "ring")
            else:
                each.module.register_forward_pre_hook(_Attend(group))
        elif each.role == "join":
            each.module.register_forward_pre_hook(_Join(group))


def share_sequence(roles: Iterable[Role], mesh: DeviceMesh) -> None:
    """Sequence parallelism, in place, beside split layers. After :func:`share_context`, where there is both.

    The gradient of a weight that meets only some of the tokens on each rank is a partial sum (a DTensor that says so)
    until it is added up.
    """
    for each in roles:
        if each.role == "each":
            parallelize_module(each.module, mesh, SequenceParallel(sequence_dim=_TOKENS, use_local_output=True))
        elif each.role == "deal":
            each.module.register_forward_hook(_DealWhole(each.name, mesh))
        elif each.role in ("gather", "join"):
            # first of all: tokens dealt out last are joined first
            each.module.register_forward_pre_hook(_Gather(mesh, local=each.role == "join"), prepend=True)


class _Deal:
    """After a module: this rank's part of the tokens. Each rank has the gradients of its own part alone."""

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self._name, self._rank, self._ranks = name, group.rank(), group.size()

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], tokens: Tensor) -> Tensor:
        refuse_indivisible("parallel.cp", self._name, tokens, self._ranks)
        return tokens.chunk(self._ranks, _TOKENS)[self._rank].contiguous()


class _Attend:
    """Before attention: keys and values of all tokens."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, module: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = arguments
        both = gathered(torch.stack([key, value]), 1 + _TOKENS_BY_HEADS, self._group)
        return query, both[0], both[1]


def _goes_round(role: Role, attention: str) -> bool:
    """Whether keys and values are passed on. Raises :class:`UserError` where they must be and cannot."""
    can = role.role == "dot_product" and _is_plain(role.module)
    if attention == "ring" and not can:
        raise UserError(
            f"parallel.cp_attention is ring, and {role.name} does more than a scaled dot product (dropout, a mask, a "
            "scale of its own), or is no 'dot_product' in Plan(tokens={...}); take gather"
        )
    return can and attention != "gather"


def _is_plain(module: nn.Module) -> bool:
    """Whether it gives, as it is in training, what plain attention gives: seen on a few numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=generator) for _ in range(3))
    with torch.no_grad(), torch.random.fork_rng([]):
        found = module(query, key, value)
        expected = F.scaled_dot_product_attention(query, key, value)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


class _Ring:
    """In place of the forward of a scaled dot product."""

    def __init__(self, forward: Any, group: dist.ProcessGroup, required: bool) -> None:
        self._forward, self._attend, self._required = forward, _Attend(group), required
        self._ring = partial(torch.compiler.disable(ring_attention), group=group)  # type: ignore[no-untyped-call]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        if takes(query, key, value) and (self._required or query.device.type == "cuda"):
            return self._ring(query, key, value)
        if self._required:
            raise UserError(
                f"parallel.cp_attention is ring, and there is no kernel here for queries of {query.dtype}, "
                f"{tuple(query.shape)}, and keys of {tuple(key.shape)}; take precision.compute bf16, and as many heads "
                "of keys, whose width is a multiple of 8 up to 256; or cp_attention gather"
            )
        return self._forward(*self._attend(self, (query, key, value)))


class _Join:
    """Before a module: all tokens. What follows is the same on every rank, and so are the gradients that come back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return gathered(arguments[0], _TOKENS, self._group), *arguments[1:]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
        ctx.axis, ctx.group = axis, group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, axis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The sum of all ranks' gradients of this rank's part."""
        parts = [part.contiguous() for part in gradients[0].chunk(ctx.group.size(), ctx.axis)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None, None


def gathered(part: Tensor, axis: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts along ``axis``; gradients come back as sums over the ranks; collective."""
    whole: Tensor = _GatherTokens.apply(part, axis, group)  # type: ignore[no-untyped-call]
    return whole


class _DealWhole:
    """After a module: this rank's part of the tokens; gradients of all parts come back to every rank."""

    def __init__(self, name: str, mesh: DeviceMesh) -> None:
        self._name, self._mesh = name, mesh

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], tokens: Tensor) -> Tensor:
        refuse_indivisible("parallel.tp", self._name, tokens, self._mesh.size())
        whole = DTensor.from_local(tokens, self._mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(_TOKENS)]).to_local()


class _Gather:
    """Before a module: all tokens from every rank's part; as they are (``local``), or as split layers take them."""

    def __init__(self, mesh: DeviceMesh, local: bool) -> None:
        self._mesh, self._local = mesh, local

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        part = DTensor.from_local(arguments[0], self._mesh, [Shard(_TOKENS)], run_check=False)
        whole = part.redistribute(placements=[Replicate()])
        return (whole.to_local() if self._local else whole, *arguments[1:])


def refuse_indivisible(setting: str, name: str, tokens: Tensor, ranks: int) -> None:
    """Raises :class:`UserError` for tokens [n, tokens, width] that the ranks cannot share."""
    count = tokens.shape[_TOKENS]
    if count % ranks:
        divisors = ", ".join(str(number) for number in range(1, min(count, 64) + 1) if count % number == 0)
        raise UserError(
            f"{setting} is {ranks} and {name} gives {count} tokens, which that many ranks cannot share; give {setting} "
            f"one of {divisors}, or the model other patches"
        )
