"""A model larger than one rank's memory: built without any, and filled layer by layer when each rank has its share.

Every layer fills its own parameters and buffers in ``reset_parameters()``, as torch's layers do, and its constructor
calls that. Each is filled whole, on the CPU, under a seed of the run's and its own name, and a rank takes over its
shard: the same weights under every layout, and never more memory than the share and one layer. (Filling shards in
place would not do: there every rank draws the same rows.)

    model, blueprint = built_on_meta(task.model)
    ...  # split, cut, shard
    blueprint.fill([model], seed=0, device=device, home=device)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dltrain.errors import UserError
from dltrain.runtime.seeds import seed_all

Write = tuple[Any, ...]
"""An operation that wrote to a tensor, and what it was given."""


@dataclass(frozen=True)
class Layer:
    """A module with tensors of its own: ``blank`` is a copy of it without memory and without children."""

    name: str
    module: nn.Module
    blank: nn.Module

    def filled(self, seed: int) -> nn.Module:
        """A copy, whole, on the CPU."""
        layer: Any = _renewed(self.blank, "cpu")
        seed_all(int.from_bytes(blake2b(f"{seed}/{self.name}".encode(), digest_size=8).digest()))
        layer.reset_parameters()
        return cast(nn.Module, layer)


class Blueprint:
    """How the layers of a model are filled."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers

    @torch.no_grad()
    def fill(self, roots: Sequence[nn.Module], seed: int, device: torch.device, home: torch.device) -> None:
        """Give the modules in ``roots`` memory, parameters on ``home`` and buffers on ``device``, and this rank's share
        of the weights; nothing is sent."""
        for root in roots:
            root.to_empty(device=home)
        here = {module for root in roots for module in root.modules()}
        for layer in self._layers:
            if layer.module in here:
                for name, buffer in layer.module._buffers.items():
                    layer.module._buffers[name] = None if buffer is None else buffer.to(device)
                whole = dict(_own(layer.filled(seed)))
                for name, tensor in _own(layer.module):
                    _take_over(tensor, whole[name])


def built_on_meta(build: Callable[[], Any]) -> tuple[Any, Blueprint]:
    """What ``build`` returns, on the meta device, and how to fill it.

    Raises :class:`UserError` for a model that reads values while it is built, that shares a parameter between layers,
    or that has a parameter or buffer which ``reset_parameters()`` of its layer does not fill as the constructor does.
    """
    writes = _Writes()
    try:
        with torch.device("meta"), writes:
            model = build()
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"parallel.meta builds the model without memory, and its constructor reads values: {error}; "
                        "set parallel.meta false") from error  # fmt: skip
    if not isinstance(model, nn.Module):
        return model, Blueprint([])
    _refuse_shared(model)
    layers = [
        Layer(name, module, _childless(module))
        for name, module in model.named_modules()
        if any(True for _ in _own(module))
    ]
    for layer in layers:
        _refuse_unfilled(type(model).__name__, layer, writes)
    return model, Blueprint(layers)


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operations write to which tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: dict[int, list[Write]] = {}
        self._tensors: list[Tensor] = []  # without memory; kept, so that no other takes its place

    def of(self, tensor: Tensor) -> list[Write]:
        return self._written.get(tensor.untyped_storage()._cdata, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        given = tree_map(lambda value: tuple(value.shape) if isinstance(value, Tensor) else value, args)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._tensors.append(value)
                self._written.setdefault(value.untyped_storage()._cdata, []).append((func, *given))
        return returned


def _refuse_unfilled(model: str, layer: Layer, built: _Writes) -> None:
    """Unless the last that the constructors did to each tensor is what ``reset_parameters()`` does."""
    again: Any = _renewed(layer.blank, "meta")
    kind, writes = type(layer.module).__name__, _Writes()
    first = f"{layer.name}.{next(iter(_own(layer.module)))[0]}".removeprefix(".")
    if not callable(getattr(again, "reset_parameters", None)):
        raise UserError(
            f"parallel.meta fills every layer by its reset_parameters(), and {kind} of {model} has none for {first}; "
            "give it one that its constructor calls, or set parallel.meta false"
        )
    try:
        with writes:
            again.reset_parameters()
    except AttributeError as error:
        raise UserError(
            f"parallel.meta fills layers one by one, and reset_parameters() of {kind}, for {first}, reached for "
            f"another: {error}; let it fill its own parameters alone, or set parallel.meta false"
        ) from error
    for (name, tensor), (_, blank) in zip(_own(layer.module), _own(again), strict=True):
        wanted = writes.of(blank)
        if tensor.numel() and (not wanted or built.of(tensor)[-len(wanted) :] != wanted):
            raise UserError(
                f"parallel.meta fills every layer by its reset_parameters(), and the constructors of {model} fill "
                f"{f'{layer.name}.{name}'.removeprefix('.')} otherwise than {kind}.reset_parameters() does; let that "
                "method do it, or set parallel.meta false"
            )


def _refuse_shared(model: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise UserError(
                f"parallel.meta fills layers one by one, and {first} and {name} of {type(model).__name__} are one "
                "parameter; set parallel.meta false"
            )


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module itself."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _childless(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__ |= {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "_modules": {}}
    return twin


def _renewed(blank: nn.Module, device: str) -> nn.Module:
    """A copy with tensors of its own, not filled."""
    layer = _childless(blank)
    for name, tensor in _own(blank):
        empty = torch.empty_like(tensor, device=device)
        if name in layer._parameters:
            layer._parameters[name] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            layer._buffers[name] = empty
    return layer


def _take_over(target: Tensor, whole: Tensor) -> None:
    """This rank's part of ``whole``, without asking another."""
    if isinstance(target, DTensor):
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)
