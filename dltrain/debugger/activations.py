"""Statistics of what modules take in and return: at work when it is due, and otherwise not there.

    watch = Activations(selection)
    watch.install(model)
    watch.begin(names, "train")  # forward passes are noted, those that checkpointing repeats are not
    watch.taken(mesh)
    watch.end()

Modules have hooks between begin and end alone; those of a model that is to be compiled have them from the start, for
later ones would never be called, and all that they do on other steps is compiled away.

Of ReLUs it also counts how often each unit (a channel of images, a feature of tokens) is active, and of tanh and
sigmoid how often it is not saturated, on the first samples of each micro-batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from dltrain.debugger.histograms import counts_of
from dltrain.debugger.moments import added, row_of
from dltrain.debugger.needs import Needs
from dltrain.debugger.selection import NOTHING, Selection
from dltrain.debugger.shares import Shares
from dltrain.mesh import Mesh

SAMPLES = 8
"""Of each micro-batch, on which units are counted."""

LEAVES = 4
"""Tensors that a module takes in or returns, of which each may be asked for by its number."""

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

_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers of which the first is given what the model is made to see."""

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.GroupNorm)
"""Layers after which the units of what has three dimensions are channels, not features."""


@dataclass
class _Site:
    """What is noted of a module: names by which leaf of its inputs or outputs they are of."""

    inputs: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    units: str = ""
    channels_first: bool = False
    channels: str = ""
    images: str = ""
    tokens: dict[int, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        single = [name for name in (self.units, self.channels, self.images) if name]
        return [*self.inputs.values(), *self.outputs.values(), *single, *self.tokens.values()]


class Activations:
    """Of a model's modules, by name: moments of what goes in and comes out, counts of units, and raw values."""

    def __init__(self, selection: Selection | None = None, compiled: bool = False) -> None:
        self._compiled = compiled
        self.on = False
        """The one thing that compiled code asks, so that there are two variants of it, however many tensors are due."""
        self.due: frozenset[str] = NOTHING
        self.mode: Literal["train", "eval"] = "train"
        self.counted: frozenset[str] = NOTHING
        self.raw: frozenset[str] = NOTHING
        self._kinds = selection.kinds if selection is not None else ("activations",)
        self._needs = selection.needs if selection is not None else Needs()
        self._patterns = [re.compile(each) for each in (selection.patterns if selection is not None else ())]
        self._sites: list[tuple[nn.Module, _Site]] = []
        self._handles: list[RemovableHandle] = []
        self._rows: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._since: dict[str, Tensor] = {}
        """Counts of channels and images since the run began."""
        self.shares = Shares()

    def begin(self, due: frozenset[str], mode: Literal["train", "eval"]) -> None:
        """Note these tensors until :meth:`end`."""
        self.end()
        self.on, self.due, self.mode = bool(due), due, mode
        if due and not self._compiled:
            self._hook()

    def end(self) -> None:
        self.on, self.due = False, NOTHING
        if not self._compiled:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def install(self, model: nn.Module) -> None:
        """The model whose modules are watched; before it is wrapped or compiled."""
        first = next((name for name, module in model.named_modules() if isinstance(module, _FIRST)), "")
        layer: nn.Module = model
        for name, module in model.named_modules():
            site = self._site(name, module, name == first)
            if next(module.parameters(recurse=False), None) is not None:
                layer = module
            site.channels_first = isinstance(layer, _CHANNELS_FIRST)
            if site.names():
                self._sites.append((module, site))
        if self._compiled:
            self._hook()

    def _hook(self) -> None:
        """Before the hooks of whoever splits the model over ranks: what is seen is what the model's author wrote."""
        for module, site in self._sites:
            if site.inputs or site.channels or site.tokens:  # before a module that works in place overwrites them
                note = partial(self._note_inputs, site)
                self._handles.append(module.register_forward_pre_hook(note, prepend=True))
            if site.outputs or site.units:
                self._handles.append(module.register_forward_hook(partial(self._note, site), prepend=True))

    def names(self) -> list[str]:
        """Of the tensors whose moments there may be: ``<module>_output_0``, ``active/<module>`` (the share of a batch
        in which each unit is active, or 0 below 1 %), and what patterns and rules ask for."""
        return [name for _, site in self._sites for name in site.names()]

    def taken(self, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
        """Names and moments [9] since last time: those of this rank's tensors, and, on one of the ranks that see other
        samples, those of shares of all their samples; collective, and before :meth:`end`."""
        rows, self._rows = self._rows, {}
        yield from rows.items()
        for name, counts in self._since.items():
            if name in self.due:
                self.shares.add(name, counts)
        yield from ((name, row_of(values)) for name, values in self.shares.taken(mesh.data_group()))

    def counts(self) -> dict[str, Tensor]:
        """Values in bins since last time, float64 [BINS], by name."""
        found, self._counts = self._counts, {}
        return found

    def kept(self) -> dict[str, Tensor]:
        """The tensors themselves since last time, samples of all micro-batches one after another."""
        found, self._kept = self._kept, {}
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _site(self, name: str, module: nn.Module, first: bool) -> _Site:
        site = _Site()
        for kind, leaves in (("input", site.inputs), ("output", site.outputs)):
            for leaf in range(LEAVES):
                found = f"{name}_{kind}_{leaf}"
                if any(pattern.search(found) for pattern in self._patterns):
                    leaves[leaf] = found
        if type(module) in _ACTIVE or isinstance(module, _PLAIN):
            if "activations" in self._kinds:
                site.outputs[0] = f"{name}_output_0"
                site.units = f"{_ACTIVE[type(module)][0]}/{name}" if type(module) in _ACTIVE else ""
            if self._needs.activation_inputs:
                site.inputs[0] = f"{name}_input_0"
        if first and self._needs.first_input:
            site.channels, site.images = f"channels/{name}_input_0", f"images/{name}_input_0"
        if isinstance(module, nn.Embedding):
            site.tokens = {token: f"tokens/{token}/{name}_input_0" for token in self._needs.tokens}
        return site

    def forget_first_input(self) -> None:
        """Of a stage that is not the pipeline's first, whose first layer is given what another has made."""
        for _, site in self._sites:
            site.channels = site.images = ""

    def _note_inputs(self, site: _Site, module: nn.Module, given: tuple[Any, ...]) -> None:
        if self.on:
            self._take_inputs(site, module, given)

    def _note(self, site: _Site, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if self.on:
            self._take(site, module, given, returned)

    @torch.compiler.disable
    @torch.no_grad()
    def _take(self, site: _Site, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if not self._watches(module):
            return
        self._keep_leaves(site.outputs, returned)
        if site.units in self.due:
            value = _local(tree_leaves(returned)[0])
            if value.dim() > 1 and len(value):
                active = _ACTIVE[type(module)][1](_local(given[0])[:SAMPLES], value[:SAMPLES])
                self.shares.add(site.units, _counted(active, site.channels_first))

    @torch.compiler.disable
    @torch.no_grad()
    def _take_inputs(self, site: _Site, module: nn.Module, given: tuple[Any, ...]) -> None:
        if not self._watches(module):
            return
        self._keep_leaves(site.inputs, given)
        if site.channels in self.due:
            local = _local(given[0])
            channels = _counted(local, site.channels_first)
            counts = {site.channels: channels, site.images: torch.tensor([[float(len(local))], [0.0]]).double()}
            for name, more in counts.items():
                self._since[name] = self._since.get(name, 0) + more.to(local.device)
        for token, name in site.tokens.items():
            if name in self.due:
                self._keep(name, (_local(given[0]) == token).float())

    def _watches(self, module: nn.Module) -> bool:
        """Whether this pass is one to note, and not one inside a backward pass, which repeats what was noted."""
        return module.training == (self.mode == "train") and torch._C._current_graph_task_id() == -1

    def _keep_leaves(self, leaves: dict[int, str], values: Any) -> None:
        found = [each for each in tree_leaves(values) if isinstance(each, Tensor)] if leaves else []
        for leaf, name in leaves.items():
            if name in self.due and leaf < len(found):
                self._keep(name, found[leaf])

    def _keep(self, name: str, value: Tensor) -> None:
        local = _local(value)
        row, before = row_of(local), self._rows.get(name)
        self._rows[name] = row if before is None else added(torch.stack([before, row]))
        if name in self.counted:
            self._counts[name] = self._counts.get(name, 0) + counts_of(local)
        if name in self.raw:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            self._kept.setdefault(name, []).append(whole.detach().clone().reshape(whole.shape or (1,)))


def _counted(values: Tensor, channels: bool = False) -> Tensor:
    """Float64 [2, units]: sums and numbers of values [n, channels, height, width], or with features last; in three
    dimensions what a convolution makes has ``channels`` before its steps."""
    axis = 1 if values.dim() >= 4 or channels else values.dim() - 1
    others = [each for each in range(values.dim()) if each != axis]
    if values.dtype == torch.bool and values.device.type == "cpu" and axis == 1:  # in half the time
        counts = np.count_nonzero(values.numpy().reshape(*values.shape[:2], -1), axis=2)
        found = torch.from_numpy(counts.sum(0)).double()
    else:
        found = values.sum(others, dtype=torch.float64)
    return torch.stack([found, torch.full_like(found, values.numel() / values.shape[axis])])


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
