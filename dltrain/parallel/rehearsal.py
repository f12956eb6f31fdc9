"""One rank's forward and backward pass, rehearsed on the meta device: every tensor has its shape, nothing is computed.

The layers are as small as tensor parallelism makes them and the tokens as few as a rank keeps; where ranks would talk,
something of the same size stands in. What is written down is how many bytes are alive from moment to moment, leaving
out weights and finished gradients, and what was moved and sent. All of it grows linearly with the samples, so two
sizes tell all others.

    rehearsed = rehearse(task, model, plan, config.precision, batch, Shares(tp=2))
    rehearsed.at(32)  # marks of a micro-batch of 32 samples
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from dltrain.config import Precision
from dltrain.data.batch import Batch
from dltrain.parallel.alone import Shares, share_out
from dltrain.parallel.checkpointing import compute_again
from dltrain.parallel.forward import inputs_of, losses_of
from dltrain.parallel.live import Kernels, Live, Log, Mark
from dltrain.parallel.plan import Plan
from dltrain.task import Task

META = torch.device("meta")
SIZES = (2, 4)
"""Samples of the two rehearsals."""


_BYTES = ("peak", "live", "moved", "kernels", "tensor", "context", "outputs", "given")


@dataclass(frozen=True)
class Weight:
    """A parameter as it is on a rank before it is sharded: its shape, bytes of an element, whether it is trained."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @cached_property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Rehearsed:
    """What :func:`rehearse` saw for both :data:`SIZES`, and the rank's ``weights``; ``sums`` are of tensor and context
    parallelism, in a forward and a backward pass."""

    weights: tuple[Weight, ...]
    few: tuple[Mark, ...]
    many: tuple[Mark, ...]
    sums: int
    _known: dict[int, list[Mark]] = field(default_factory=dict, compare=False)

    def at(self, samples: int) -> list[Mark]:
        """The marks of so many samples."""
        if samples not in self._known:
            ahead = (samples - SIZES[0]) / (SIZES[1] - SIZES[0])
            self._known[samples] = [_between(*pair, ahead) for pair in zip(self.few, self.many, strict=True)]
        return self._known[samples]


def _between(few: Mark, many: Mark, ahead: float) -> Mark:
    values = {name: getattr(few, name) for name in _BYTES}
    return replace(
        few, **{name: max(0.0, value + ahead * (getattr(many, name) - value)) for name, value in values.items()}
    )


def rehearse(
    task: Task,
    model: nn.Module,
    plan: Plan,
    precision: Precision,
    batch: Batch,
    shares: Shares,
    names: Sequence[str] = (),
) -> Rehearsed:
    """Go through a step of ``model``, on meta, which stays as it is; ``batch`` has some samples of the training data.

    Marks are made for the plan's units and for the modules of these ``names``. Raises :class:`UserError` for layers
    and tokens that the ranks cannot share.
    """
    twin = deepcopy(model).train()
    log = Log()
    share_out(twin, plan, shares, log)
    weights = tuple(
        Weight(name, tuple(value.shape), value.element_size(), value.requires_grad)
        for name, value in twin.named_parameters()
    )
    if shares.cast and precision.compute != "fp32":
        _cast(twin)
    low = precision.compute != "fp32" and not shares.cast
    if shares.again:
        units = plan.modules(twin)
        for unit in units:  # what is computed again takes the same kernels
            unit.forward = partial(_with_kernels, low, unit.forward)
        compute_again(units, shares.again)
    _watch(twin, dict.fromkeys((*plan.found(model), *names)), log)
    few, many = (_passed(task, twin, precision, on_meta(batch, size), low, log) for size in SIZES)
    assert [mark.name for mark in few] == [mark.name for mark in many]
    return Rehearsed(weights, few, many, log.sums // len(SIZES))


def _with_kernels(low: bool, forward: Any, *values: Any, **named: Any) -> Any:
    with Kernels(low):
        return forward(*values, **named)


def on_meta(batch: Batch, samples: int) -> Batch:
    """So many samples like those of ``batch``."""
    fields = {name: _sized(value, samples) for name, value in batch.fields.items()}
    return Batch(fields, _sized(batch.weight, samples), ("",) * samples, _sized(batch.position, samples))


def _sized(value: Tensor, samples: int) -> Tensor:
    return torch.empty(samples, *value.shape[1:], dtype=value.dtype, device=META)


def _passed(task: Task, model: nn.Module, precision: Precision, batch: Batch, low: bool, log: Log) -> tuple[Mark, ...]:
    """The marks of a forward and a backward pass."""
    log.marks, log.live = [], Live([*model.parameters(), *model.buffers()])
    with log.live:
        for value in (*batch.fields.values(), batch.weight, batch.position):
            log.live.note(value)
        log.mark("begin")
        loss = torch.dot(_losses(task, model, precision, batch, low, log), batch.weight)
        log.mark("loss")
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        log.mark("end")
    return tuple(log.marks)


def _losses(task: Task, model: nn.Module, precision: Precision, batch: Batch, low: bool, log: Log) -> Tensor:
    inputs = inputs_of(task, batch, precision)
    log.mark("inputs")
    with Kernels(low):
        outputs = model(*inputs)
    return losses_of(task, outputs, batch, precision)[1]


def _watch(model: nn.Module, names: Iterable[str], log: Log) -> None:
    """Marks where modules begin and end, forward and backward, and where gradients are finished."""
    modules = dict(model.named_modules())
    for name in names:
        modules[name].register_forward_pre_hook(partial(_entering, log, name), prepend=True)
        modules[name].register_forward_hook(partial(_leaving, log, name))
    for module in modules.values():
        if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
            module.register_forward_hook(partial(_noting, log))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hook = partial(_finished, log, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _entering(log: Log, name: str, module: nn.Module, given: Any) -> None:
    tensors = _tensors(given)
    log.mark("enter", name, sum(value.numel() * value.element_size() for value in tensors))
    for value in [value for value in tensors if value.requires_grad][:1]:
        value.register_hook(lambda _: log.mark("done", name))  # type: ignore[no-untyped-call]


def _leaving(log: Log, name: str, module: nn.Module, given: Any, returned: Any) -> None:
    log.mark("leave", name)
    for value in [value for value in _tensors(returned) if value.requires_grad][:1]:
        value.register_hook(lambda _: log.mark("back", name))  # type: ignore[no-untyped-call]


def _noting(log: Log, module: nn.Module, given: Any, returned: Any) -> None:
    log.sent["outputs"] += sum(value.numel() * value.element_size() for value in _tensors(returned))


def _finished(log: Log, name: str, parameter: Tensor) -> None:
    log.mark("gradient", name)
    parameter.grad = None


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _cast(model: nn.Module) -> None:
    """As FSDP2 does under bf16: all but batch norm, whose values come and go in bf16."""
    for module in model.modules():
        norm = isinstance(module, _BatchNorm)
        if norm:
            module.register_forward_pre_hook(lambda _, given: tuple(value.float() for value in given))
            module.register_forward_hook(lambda *seen: seen[-1].bfloat16())
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
    model.register_forward_pre_hook(lambda _, given: tree_map(_low, given))


def _low(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
