"""Tensor parallelism (Shoeybi et al., "Megatron-LM", 2019): linear layers split over ranks with the same samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dltrain.errors import UserError, nearest
from dltrain.parallel.plan import Plan, matching

_STYLES = ("column", "row")
_TOKENS = 1  # of [n, tokens, width]


@dataclass(frozen=True)
class Split:
    """A layer and how it is split, "column" or "row"."""

    layer: nn.Module
    style: str


def splits_of(model: nn.Module, plan: Plan, ranks: int) -> list[Split]:
    """What the plan splits over so many ranks; nothing is changed.

    Raises :class:`UserError` for a plan that splits nothing, and for a layer that the ranks do not divide.
    """
    if not plan.tensor:
        raise UserError(
            f"parallel.tp is {ranks}, and the plan of {type(model).__name__} does not say how to split its "
            "layers; name them in Plan(tensor={...}), or shard with parallel.dp_shard instead"
        )
    found = []
    for pattern, style in plan.tensor.items():
        if style not in _STYLES:
            raise UserError(f"the plan splits {pattern!r} by {style!r}; {nearest(style, _STYLES)}")
        for name, module in matching(model, pattern).items():
            _refuse_indivisible(model, name, module, style, ranks)
            found.append(Split(module, style))
    return found


def split(splits: Iterable[Split], mesh: DeviceMesh, sequence: bool) -> None:
    """Split the layers in place; the weights stay those the model has, the same on every rank.

    With ``sequence`` a row layer leaves each rank its part of the tokens [n, tokens / ranks, width].
    """
    styles = {
        "column": ColwiseParallel(),
        "row": RowwiseParallel(output_layouts=Shard(_TOKENS) if sequence else None),
    }
    for each in splits:
        trained = {name: parameter.requires_grad for name, parameter in each.layer.named_parameters()}
        parallelize_module(each.layer, mesh, styles[each.style])
        for name, parameter in each.layer.named_parameters():  # some versions of torch forget what is frozen
            parameter.requires_grad_(trained[name])


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
