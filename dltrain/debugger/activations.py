"""Statistics of what modules return: installed before the model is compiled, at work on due steps alone.

    watch = Activations()
    watch.install(model)
    watch.on = True  # for a step: forward passes are noted, those that activation checkpointing repeats are not
    watch.taken()

Of ReLUs it also counts how often each unit (a channel of images, a feature of tokens) is active, and of tanh and
sigmoid how often it is not saturated, on the first samples of each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dltrain.debugger.moments import added, moments_of
from dltrain.mesh import Mesh

SAMPLES = 8
"""Of each micro-batch, on which units are counted."""

LEAST = 0.01
"""Of the elements: a unit that is active in fewer is dead."""

TANH = (-9.4999, 9.4999)
SIGMOID = (-23.0, 16.99999)
"""Inputs beyond which a unit counts as saturated, as SageMaker Debugger has them."""


def _within(bounds: tuple[float, float], given: Tensor, returned: Tensor) -> Tensor:
    return (given >= bounds[0]) & (given <= bounds[1])


def _positive(given: Tensor, returned: Tensor) -> Tensor:
    return returned > 0


_ACTIVE: dict[type[nn.Module], tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: ("active", _positive),
    nn.ReLU6: ("active", _positive),
    nn.Tanh: ("unsaturated", partial(_within, TANH)),
    nn.Sigmoid: ("unsaturated", partial(_within, SIGMOID)),
}
"""How elements are called that do something, and which those are by the module's input and output."""

_PLAIN = (nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Softplus, nn.Mish)
"""Activations whose units are not counted."""


class Activations:
    """Of a model's activation modules, by name: moments of what they return, and counts of their active units."""

    def __init__(self) -> None:
        self.on = False
        self.modules: dict[str, str] = {}
        """By name, how their active units are called; empty where they are not counted."""
        self._rows: dict[str, Tensor] = {}
        self._units: dict[str, Tensor] = {}

    def install(self, model: nn.Module) -> None:
        """Give activation modules hooks; before the model is compiled, or they would never be called."""
        for name, module in model.named_modules():
            if type(module) in _ACTIVE or isinstance(module, _PLAIN):
                self.modules[name] = _ACTIVE[type(module)][0] if type(module) in _ACTIVE else ""
                module.register_forward_hook(partial(self._note, name))

    def names(self) -> list[str]:
        """Of the tensors whose moments there will be: ``<module>_output_0``, and ``active/<module>``, the share of a
        batch in which each unit is active, or 0 below :data:`LEAST`."""
        counted = [f"{kind}/{name}" for name, kind in self.modules.items() if kind]
        return [*(f"{name}_output_0" for name in self.modules), *counted]

    def taken(self, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
        """Names and moments [9] since last time: those of this rank's outputs, and, on one of the ranks that see other
        samples, those of shares of all their samples; collective."""
        rows, units = self._rows, self._units
        self._rows, self._units = {}, {}
        yield from ((f"{name}_output_0", row) for name, row in rows.items())
        if not units:
            return
        counts = torch.cat(list(units.values()), 1)
        group = mesh.data_group()
        if group is not None:
            dist.all_reduce(counts, group=group)
            if dist.get_rank(group):
                return
        shares = torch.where(counts[0] < LEAST * counts[1], 0.0, counts[0] / counts[1]).float()
        parts = torch.split(shares, [each.shape[1] for each in units.values()])
        for name, share in zip(units, parts, strict=True):
            yield f"{self.modules[name]}/{name}", moments_of([share])[0]

    def _note(self, name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if self.on and module.training:
            self._take(name, module, given, returned)

    @torch.compiler.disable
    @torch.no_grad()
    def _take(self, name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass, which repeats what was noted
            return
        value = _local(returned)
        row = moments_of([value])[0]
        before = self._rows.get(name)
        self._rows[name] = row if before is None else added(torch.stack([before, row]))
        if self.modules[name] and value.dim() > 1 and len(value):
            active = _ACTIVE[type(module)][1]
            counts = _counted(active(_local(given[0])[:SAMPLES], value[:SAMPLES]))
            self._units[name] = self._units[name] + counts if name in self._units else counts


def _counted(active: Tensor) -> Tensor:
    """Float64 [2, units] of bool [n, channels, height, width], or with features last."""
    axis = 1 if active.dim() >= 4 else active.dim() - 1
    others = [each for each in range(active.dim()) if each != axis]
    found = active.sum(others, dtype=torch.float64)
    return torch.stack([found, torch.full_like(found, active.numel() / active.shape[axis])])


def _local(value: Any) -> Tensor:
    first: Tensor = value[0] if isinstance(value, tuple) else value
    return first.to_local() if isinstance(first, DTensor) else first
