"""Tensor parallelism (Shoeybi et al., "Megatron-LM", 2019): linear layers split over ranks with the same samples.

With sequence parallelism (Korthikanti et al., "Reducing Activation Recomputation", 2022) each rank keeps its part of
the tokens between split layers: what every rank would hold and compute in full, norms and residual sums, is shared out.
The sum behind a row layer becomes a reduce-scatter, and a gather stands before the next column layers: as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dltrain.errors import UserError, nearest
from dltrain.parallel.plan import Plan, matching

STYLES = ("column", "row", "tokens", "gather", "join", "deal")
"""How a plan may treat a module. ``column`` and ``row`` split linear layers. The others matter to sequence parallelism:
``tokens`` works on each token by itself, a norm; ``gather`` wants all tokens for the column layers inside; ``join``
wants all tokens and has no split layer; ``deal`` returns all tokens, of which each rank is to keep its part."""

_TOKENS = 1  # of [n, tokens, width]


@dataclass(frozen=True)
class Split:
    """A module and how it is treated, one of :data:`STYLES`."""

    name: str
    module: nn.Module
    style: str


def splits_of(model: nn.Module, plan: Plan, ranks: int, sequence: bool) -> list[Split]:
    """What the plan splits over so many ranks; nothing is changed.

    Raises :class:`UserError` for a plan that splits nothing, and for a layer that the ranks do not divide.
    """
    if not any(style in ("column", "row") for style in plan.tensor.values()):
        raise UserError(
            f"parallel.tp is {ranks}, and the plan of {type(model).__name__} does not say how to split its "
            "layers; name them in Plan(tensor={...}), or shard with parallel.dp_shard instead"
        )
    if sequence and "deal" not in plan.tensor.values():
        raise UserError(
            f"parallel.sequence is on, and the plan of {type(model).__name__} does not say where tokens are dealt out "
            "and joined; name modules 'deal', 'tokens', 'gather' and 'join' in Plan(tensor={...}), or leave it off"
        )
    found = []
    for pattern, style in plan.tensor.items():
        if style not in STYLES:
            raise UserError(f"the plan splits {pattern!r} by {style!r}; {nearest(style, STYLES)}")
        for name, module in matching(model, pattern).items():
            if style in ("column", "row"):
                _refuse_indivisible(model, name, module, style, ranks)
            if sequence or style in ("column", "row"):
                found.append(Split(name, module, style))
    return found


def split(splits: Iterable[Split], mesh: DeviceMesh, sequence: bool) -> None:
    """Split the layers in place; the weights stay those the model has, the same on every rank.

    With ``sequence`` the gradient of a weight that meets only some of the tokens on each rank is a partial sum
    (a DTensor that says so) until it is added up.
    """
    styles: dict[str, ParallelStyle] = {
        "column": ColwiseParallel(),
        "row": RowwiseParallel(output_layouts=Shard(_TOKENS) if sequence else None),
        "tokens": SequenceParallel(sequence_dim=_TOKENS, use_local_output=True),
    }
    for each in splits:
        if each.style in styles:
            parallelize_module(each.module, mesh, styles[each.style])
        elif each.style == "deal":
            each.module.register_forward_hook(_Deal(mesh, each.name))
        else:
            each.module.register_forward_pre_hook(_Bring(mesh, local=each.style == "join"))


class _Bring:
    """Before a module: all tokens from every rank's part. ``local``: the module knows nothing of split layers."""

    def __init__(self, mesh: DeviceMesh, local: bool) -> None:
        self._mesh, self._local = mesh, local

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        part = DTensor.from_local(arguments[0], self._mesh, [Shard(_TOKENS)], run_check=False)
        whole = part.redistribute(placements=[Replicate()])
        return (whole.to_local() if self._local else whole, *arguments[1:])


class _Deal:
    """After a module: this rank's part of the tokens, which all ranks have."""

    def __init__(self, mesh: DeviceMesh, name: str) -> None:
        self._mesh, self._name = mesh, name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], tokens: Tensor) -> Tensor:
        count, ranks = tokens.shape[_TOKENS], self._mesh.size()
        if count % ranks:
            raise UserError(
                f"parallel.sequence is on and {self._name} gives {count} tokens, which parallel.tp {ranks} does not "
                f"divide; give parallel.tp one of {_divisors(count)}, the model other patches, or leave it off"
            )
        whole = DTensor.from_local(tokens, self._mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(_TOKENS)]).to_local()


def _refuse_indivisible(model: nn.Module, name: str, module: nn.Module, style: str, ranks: int) -> None:
    if not isinstance(module, nn.Linear):
        raise UserError(
            f"the plan splits {name}, a {type(module).__name__}; tensor parallelism splits nn.Linear layers"
        )
    parent = model.get_submodule(name.rpartition(".")[0])
    heads = getattr(parent, "heads", None)
    if isinstance(heads, int) and heads % ranks:
        raise UserError(
            f"parallel.tp is {ranks} and {name.rpartition('.')[0]} has {heads} heads, which that many ranks cannot "
            f"share; give parallel.tp one of {_divisors(heads)}, or the model a multiple of {ranks} heads"
        )
    size, what = (module.out_features, "outputs") if style == "column" else (module.in_features, "inputs")
    if size % ranks:
        raise UserError(
            f"parallel.tp is {ranks} and {name} has {size} {what}, which that many ranks cannot share; "
            f"give parallel.tp one of {_divisors(size)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, min(number, 64) + 1) if number % divisor == 0)
