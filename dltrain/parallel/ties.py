"""Tied weights: one parameter under several names, such as a head's that is the embedding's (Press and Wolf, 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from dltrain.errors import UserError
from dltrain.parallel.tensor import Split


def ties(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that has more than one, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def self_contained(model: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    """The units that share no parameter with a module outside of themselves.

    FSDP2 gives each unit new parameters for its own: shared with others, they would be two from then on. What is left
    out belongs to the root, which holds both owners.
    """
    tied = ties(model)
    if not tied:
        return list(units)
    names = {id(module): name for name, module in model.named_modules()}
    return [unit for unit in units if all(_together(names[id(unit)], some) for some in tied)]


def refuse_split_ties(model: nn.Module, splits: Sequence[Split]) -> None:
    """A layer that is split gets weights of its own, so it cannot share them."""
    layers = {id(each.layer) for each in splits}
    for names in ties(model):
        for name in names:
            other = names[1] if name == names[0] else names[0]
            if id(model.get_submodule(name.rpartition(".")[0])) in layers:
                raise UserError(
                    f"{name} and {other} of {type(model).__name__} are one weight, and a layer that is split over "
                    "ranks cannot share its own; take it out of Plan(tensor={...}), or give parallel.tp 1"
                )


def refuse_untied(model: nn.Module, tied: Sequence[Sequence[str]]) -> None:
    """Raises :class:`UserError` where a layout has made several parameters of one; they would be trained apart."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in tied:
        here = [name for name in names if name in parameters]
        for name in here[1:]:
            if parameters[name] is not parameters[here[0]]:
                raise UserError(
                    f"{here[0]} and {name} of the model are one weight, and this layout makes two of it; "
                    "leave both out of the plan's units and split layers, so that they stay together, or train with "
                    "replicas alone (parallel.dp_shard 1, parallel.tp 1)"
                )


def _together(unit: str, names: Sequence[str]) -> bool:
    inside = [name.startswith(f"{unit}.") for name in names]
    return all(inside) or not any(inside)
