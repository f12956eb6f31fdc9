"""Finding out that a model's forward is a chain of modules, by watching one forward pass that computes nothing."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Call:
    name: str
    given: tuple[int, ...]
    returned: int


def discovered(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of modules that the model's forward calls one after another, each on what the one before returned.

    As many as can be: a module that is such a chain itself is taken apart. Empty where there are not two.
    """
    calls = _watched(model, inputs)
    links = tuple(_taken_apart("", calls))
    return links if len(links) > 1 else ()


def to_meta(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of both that computes nothing and takes no memory, in evaluation mode."""
    moved = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs)
    blank: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        blank[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return deepcopy(model, blank).to("meta").eval(), moved


def _watched(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, list[_Call]]:
    """What each module was given and returned in every call, by name, in the order in which calls ended."""
    twin, moved = to_meta(model, inputs)
    calls: dict[str, list[_Call]] = {}
    kept: list[Any] = []  # so that no two tensors have one id

    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            kept.append((given, returned))
            calls.setdefault(name, []).append(_Call(name, tuple(map(id, given)), id(returned)))

        module.register_forward_hook(note)

    for name, module in twin.named_modules():
        watch(name, module)
    with torch.no_grad():
        twin(*moved)
    return calls


def _taken_apart(name: str, calls: dict[str, list[_Call]]) -> list[str]:
    whole, parts = calls[name][0], _children(name, calls)
    if not _is_chain(whole, parts):
        return [name] if name else []
    return [link for part in parts for link in _taken_apart(part.name, calls)]


def _children(name: str, calls: dict[str, list[_Call]]) -> list[_Call]:
    """Calls of the nearest modules below, through containers that are not called themselves; in order."""
    prefix = f"{name}." if name else ""
    below = [other for other in calls if other != name and other.startswith(prefix)]
    nearest = [other for other in below if not any(other.startswith(f"{upper}.") for upper in below)]
    return [call for found in calls.values() for call in found if call.name in nearest]


def _is_chain(whole: _Call, parts: list[_Call]) -> bool:
    if len({part.name for part in parts}) != len(parts) or not parts:
        return False
    given = (whole.given, *((part.returned,) for part in parts[:-1]))
    return all(part.given == before for part, before in zip(parts, given, strict=True)) and (
        parts[-1].returned == whole.returned
    )
