"""Finding out that a model's forward is a chain of modules, by watching forward passes that compute nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Noted = TypeVar("Noted")


@dataclass(frozen=True)
class _Call:
    name: str
    given: tuple[int, ...]
    returned: int


def discovered(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Names of modules that the model's forward calls one after another, each on what the one before returned.

    As many as can be: a module that is such a chain itself is taken apart. Empty where there are not two, where
    training goes another way than evaluation, or each time another, and where they leave out some of the model's state.
    """
    found = {tuple(_taken_apart("", _watched(model, inputs, training, passes))) for training, passes in MODES}
    links = found.pop()
    return links if not found and len(links) > 1 and _cover(model, links) else ()


MODES = ((False, 1), (True, 1), (True, 2))
"""Whether in training, and in which pass: what is left to chance, or counts, may go another way the second time."""


def played(
    model: nn.Module, inputs: tuple[Any, ...], training: bool, watch: Callable[[nn.Module], Noted], passes: int = 1
) -> tuple[Noted, tuple[Any, ...], Any]:
    """What ``watch`` notes in the last of some forward passes by the hooks that it gives a model, the arguments, and
    what is returned.

    Of a copy that computes nothing and takes no memory; or, where the forward looks at values, of the model itself,
    whose buffers, mode and hooks are as before afterwards.
    """
    try:
        twin, moved = to_meta(model, inputs)
        return _passed(twin, moved, training, watch, passes)
    except Exception:  # noqa: BLE001 - of a copy without values; the model itself tells what is really wrong
        return _played_for_real(model, inputs, training, watch, passes)


@torch.no_grad()
def _passed(
    model: nn.Module, inputs: tuple[Any, ...], training: bool, watch: Callable[[nn.Module], Noted], passes: int
) -> tuple[Noted, tuple[Any, ...], Any]:
    model.train(training)
    for _ in range(passes - 1):
        model(*inputs)
    return watch(model), inputs, model(*inputs)


def _played_for_real(
    model: nn.Module, inputs: tuple[Any, ...], training: bool, watch: Callable[[nn.Module], Noted], passes: int
) -> tuple[Noted, tuple[Any, ...], Any]:
    hooks = {module: (module._forward_hooks.copy(), module._forward_pre_hooks.copy()) for module in model.modules()}
    buffers, mode = [buffer.clone() for buffer in model.buffers()], model.training
    try:
        return _passed(model, inputs, training, watch, passes)
    finally:
        model.train(mode)
        for module, (after, before) in hooks.items():
            module._forward_hooks, module._forward_pre_hooks = after, before
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)


def to_meta(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of both that computes nothing and takes no memory."""
    moved = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs)
    blank: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        blank[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return deepcopy(model, blank).to("meta"), moved


def _watched(model: nn.Module, inputs: tuple[Any, ...], training: bool, passes: int) -> dict[str, list[_Call]]:
    """What each module was given and returned in every call, by name, in the order in which calls ended."""
    return played(model, inputs, training, _noting_calls, passes)[0].calls


class _Calls:
    """Of modules by name; values are kept, so that no two have one id."""

    def __init__(self) -> None:
        self.calls: dict[str, list[_Call]] = {}
        self._values: list[Any] = []

    def note(self, name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        self._values.append((given, returned))
        self.calls.setdefault(name, []).append(_Call(name, tuple(map(id, given)), id(returned)))


def _noting_calls(model: nn.Module) -> _Calls:
    noted = _Calls()
    for name, module in model.named_modules():
        module.register_forward_hook(partial(noted.note, name))
    return noted


def _cover(model: nn.Module, links: Sequence[str]) -> bool:
    """Whether every parameter and buffer is inside of one of the links."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return all(any(name.startswith(f"{link}.") for link in links) for name in names)


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
