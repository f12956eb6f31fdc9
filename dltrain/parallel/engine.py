"""A parallelised model behind one small protocol.

The engine owns what differs between layouts: forward and backward over micro-batches, clipping, the optimizer step,
and the state of model and optimizer. It never looks at a value on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.optim.optimizer import set_learning_rate, skip_if_nonfinite, skips_by_itself
from dltrain.parallel.data import BufferSync
from dltrain.parallel.gradients import clip, global_norm, gradients_of
from dltrain.task import Loss, Task

_NOTHING: AbstractContextManager[None] = nullcontext()

_LEAST_COUNT = 1e-20
"""A step whose samples all weigh 0 has no gradient, rather than one that is not a number."""


class Engine(Protocol):
    """What the loop asks of a layout."""

    device: torch.device

    counts: bool
    """Whether this rank stands for those that see the same samples, in sums over all ranks."""

    def forward_backward(self, batch: Batch, count: Tensor) -> Loss:
        """Gradients of ``sum of weighted losses / count`` over all data ranks; ``count`` is the global count, a float
        scalar on the device. Returns this rank's loss sum, detached, and its count."""
        ...

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        """Clip (unless ``max_norm`` is 0), update and clear gradients. Returns the global norm before clipping, float32
        scalar; an update whose norm is not finite changes nothing."""
        ...

    def evaluate(self, batch: Batch) -> tuple[Any, Tensor]:
        """The task's predictions and its losses per sample [n], in evaluation mode and without gradients."""
        ...

    def settle(self, peek: Callable[[], Batch]) -> None:
        """Whatever the first steps would do differently from all later ones, done now without a trace.

        ``peek`` gives the batch to do it on."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names they have in the model alone."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients by name, float32, of the parameters that have one, after the backward pass; collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """``{"model": ..., "optimizer": ...}``, tensors by parameter name, sharded as they are."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, under any layout."""
        ...


class PlainEngine:
    """One process, DDP, FSDP2 or HSDP, with split layers or without: every rank runs the whole forward and backward."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: Optimizer,
        config: Config,
        device: torch.device,
        data_ranks: int,
        counts: bool = True,
    ) -> None:
        self.device, self.counts = device, counts
        self.model = model
        self.optimizer = optimizer
        self._task, self._wrapped = task, wrapped
        self._data_ranks = data_ranks
        self._micro_batch = config.parallel.micro_batch
        self._channels_last = config.precision.channels_last
        self._bf16 = config.precision.compute == "bf16"
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sync_buffers = BufferSync(model, undo=config.run.nonfinite == "skip")
        self._skips_by_itself = skips_by_itself(optimizer)
        self._syncs = isinstance(wrapped, DistributedDataParallel | FSDPModule)

    def forward_backward(self, batch: Batch, count: Tensor) -> Loss:
        if not self._wrapped.training:
            self._wrapped.train()
        # DDP and FSDP2 average over data ranks; the sum is wanted, for `count` is the global one
        scale = self._data_ranks / count.clamp(min=_LEAST_COUNT)
        pieces = list(batch.split(self._micro_batch))
        total: Tensor | None = None
        for place, piece in enumerate(pieces):
            piece = piece.to(self.device)
            with self._synchronised(place == len(pieces) - 1):
                loss = torch.dot(self._losses(piece)[1], piece.weight)
                self._backward(loss, scale)
            total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            raise AssertionError("a batch has at least one sample")
        return Loss(total, count)

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        gradients = gradients_of(self._parameters)
        norm = global_norm(gradients)
        if max_norm:
            clip(gradients, norm, max_norm)
        set_learning_rate(self.optimizer, learning_rate)
        self._update(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self._sync_buffers(norm)
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Any, Tensor]:
        self._wrapped.eval()
        parts = []
        for piece in batch.split(self._micro_batch):
            piece = piece.to(self.device)
            outputs, losses = self._losses(piece, self.model)
            parts.append((self._task.predictions(outputs, piece), losses))
        joined: tuple[Any, Tensor] = parts[0] if len(parts) == 1 else tree_map(lambda *some: torch.cat(some), *parts)
        return joined

    def settle(self, peek: Callable[[], Batch]) -> None:
        """DDP orders its buckets anew after the first backward pass, and with three or more ranks another order gives
        another last bit. Two passes before the first step, of a fresh or a resumed run, make all steps alike."""
        if not isinstance(self._wrapped, DistributedDataParallel):
            return
        batch = peek()
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        for _ in range(2):
            self.forward_backward(batch, torch.ones((), device=self.device))
            self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is not None:
                yield name, (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().float()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def _backward(self, loss: Tensor, scale: Tensor) -> None:
        loss.backward(scale)  # type: ignore[no-untyped-call]

    def _update(self, norm: Tensor) -> None:
        """The optimizer's step, unless the norm is not finite."""
        # on a CPU the value is at hand, and asking the optimizer to look would take 20 microseconds
        if norm.device.type == "cpu" or not self._skips_by_itself:
            if math.isfinite(norm.item()):
                self.optimizer.step()
            return
        skip_if_nonfinite(self.optimizer, (norm - norm).ne_(0.0))  # NaN - NaN and inf - inf are not 0
        self.optimizer.step()

    def _losses(self, batch: Batch, model: nn.Module | None = None) -> tuple[Any, Tensor]:
        model = self._wrapped if model is None else model
        inputs = self._task.inputs(batch)
        if self._channels_last:
            inputs = tree_map(_to_channels_last, inputs)
        if not self._bf16:
            outputs = model(*inputs)
            return outputs, self._per_sample(outputs, batch)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not isinstance(model, FSDPModule)):
            outputs = model(*inputs)
        outputs = tree_map(_to_float, outputs)
        return outputs, self._per_sample(outputs, batch)

    def _per_sample(self, outputs: Any, batch: Batch) -> Tensor:
        losses = self._task.loss(outputs, batch)
        if losses.shape != batch.weight.shape:
            raise UserError(
                f"{type(self._task).__name__}.loss() returned shape {tuple(losses.shape)} for {len(batch)} samples; "
                "return one value per sample (reduction='none')"
            )
        return losses.float()

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in the last micro-batch alone."""
        if not self._syncs:
            return _NOTHING
        if isinstance(self._wrapped, DistributedDataParallel):
            return _NOTHING if last else cast(AbstractContextManager[None], self._wrapped.no_sync())
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(last)
        return _NOTHING


def _to_channels_last(value: Any) -> Any:
    return (
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
    )


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
