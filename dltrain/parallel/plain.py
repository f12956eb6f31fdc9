"""The engine of layouts in which every rank runs the whole forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dltrain.config import Config
from dltrain.config.tree import AUTO
from dltrain.data.batch import Batch
from dltrain.mesh import Mesh
from dltrain.parallel.data import refuse_unused, replicate
from dltrain.parallel.forward import autocast, inputs_of, joined, losses_of
from dltrain.parallel.probe import probe
from dltrain.parallel.settling import patiently, without_trace
from dltrain.parallel.update import Updating, trained
from dltrain.runtime.logs import say
from dltrain.runtime.step_clock import CLOCK
from dltrain.task import Loss, Task

_NOTHING: AbstractContextManager[None] = nullcontext()


class PlainEngine(Updating):
    """One process, DDP, FSDP2 or HSDP, with split layers or without: ``wrapped`` is ``model`` as those have it."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: Optimizer,
        config: Config,
        device: torch.device,
        mesh: Mesh,
    ) -> None:
        super().__init__(model, optimizer, config, mesh, device, trained(model))
        self.counts = mesh.counts
        self._task, self._wrapped = task, wrapped
        self._parallel = config.parallel
        self.micro_batch = config.parallel.micro_batch
        self._precision = config.precision
        self._settled = False
        self._syncs = isinstance(wrapped, DistributedDataParallel | FSDPModule)

    def forward_backward(self, batch: Batch, count: Tensor) -> Loss:
        if not self._wrapped.training:
            self._wrapped.train()
        seed = self._seed(count)
        pieces = list(batch.split(max(0, self.micro_batch)))
        total: Tensor | None = None
        for place, piece in enumerate(pieces):
            piece = piece.to(self.device)
            with self._synchronised(place == len(pieces) - 1):
                losses = self._losses(piece, self._wrapped)[1]
                self.sample_losses.add(piece, losses)
                loss = torch.dot(losses, piece.weight)
                CLOCK.mark("forward")
                if CLOCK.on:
                    loss.register_hook(_mark_when_computed)  # type: ignore[no-untyped-call]
                self._backward(loss, seed)
                CLOCK.mark("communication")
            total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            raise AssertionError("a batch has at least one sample")
        self._complete_gradients()
        return Loss(total, count)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Any, Tensor]:
        self._wrapped.eval()
        parts = []
        for piece in batch.split(max(0, self.micro_batch)):
            piece = piece.to(self.device)
            outputs, losses = self._losses(piece, self.model)
            parts.append((self._task.predictions(outputs, piece), losses))
        return joined(parts)

    def settle(self, peek: Callable[[], Batch]) -> None:
        """DDP orders its buckets anew after the first backward pass, and with three or more ranks another order gives
        another last bit. Two passes before the first step, of a fresh or a resumed run, make all steps alike. One pass
        compiles what is to be compiled. Before them the size of micro-batches is found, where it is left to us, and
        whether DDP would wait for gradients that never come."""
        passes = 2 if isinstance(self._wrapped, DistributedDataParallel) else int(self._precision.compile)
        if self._settled or not (passes or self.micro_batch == AUTO):
            return
        self._settled, batch = True, peek()
        groups = self.mesh.groups() if self._precision.compile else []
        with patiently(groups, self._parallel.timeout), without_trace(self.model, self.optimizer, self.device):
            if self.micro_batch == AUTO:
                self._find_micro_batch(batch)
            self._find_unused(batch)
            for _ in range(passes):
                self.forward_backward(batch, torch.ones((), device=self.device))
                self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor, seed: Tensor) -> None:
        loss.backward(seed)  # type: ignore[no-untyped-call]

    def _find_micro_batch(self, batch: Batch) -> None:
        self._wrapped.train()
        self.micro_batch = probe(len(batch), partial(self._attempt, batch), self.optimizer, self.device)
        told = f"parallel.micro_batch auto: {self.micro_batch} of {len(batch)} samples at a time"
        say(self.mesh.environment, f"{told}, which every rank has the memory for")

    def _find_unused(self, batch: Batch) -> None:
        """DDP anew, looking for parameters without a gradient, where the model beneath it leaves some on any rank."""
        parallel = self._parallel
        if not isinstance(self._wrapped, DistributedDataParallel) or parallel.find_unused_parameters:
            return
        self._pass_alone(next(batch.split(self.micro_batch)))
        unused = [name for name, each in self.model.named_parameters() if each.requires_grad and each.grad is None]
        self.optimizer.zero_grad(set_to_none=True)
        some = torch.tensor(float(len(unused)), device=self.device)
        dist.all_reduce(some)
        if some.item():
            more = f" and {len(unused) - 1} other parameters get" if len(unused) > 1 else " gets"
            named = unused[0] + more if unused else "some parameters on another rank get"
            say(self.mesh.environment, f"{named} no gradient: DDP looks for such parameters in every step")
            self._wrapped = replicate(self.model, self.device, parallel, find_unused=True)

    def _attempt(self, batch: Batch, samples: int) -> None:
        """What a step does in micro-batches of so many samples, but the last: a pass, and one beside its gradients."""
        passes = 2 if samples < len(batch) else 1
        try:
            for number in range(passes):
                with self._synchronised(number == passes - 1):
                    self._pass_alone(next(batch.split(samples)))
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _pass_alone(self, piece: Batch) -> None:
        """Forward and backward beneath DDP, which has no part in it."""
        piece = piece.to(self.device)
        torch.dot(self._losses(piece, self.model)[1], piece.weight).backward()  # type: ignore[no-untyped-call]

    def _losses(self, batch: Batch, model: nn.Module) -> tuple[Any, Tensor]:
        inputs = inputs_of(self._task, batch, self._precision)
        with autocast(self.device, self._precision, isinstance(model, FSDPModule)):
            try:
                outputs = model(*inputs)
            except RuntimeError as error:
                refuse_unused(error)
                raise
        return losses_of(self._task, outputs, batch, self._precision)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced in the last micro-batch alone."""
        if not self._syncs:
            return _NOTHING
        if isinstance(self._wrapped, DistributedDataParallel):
            return _NOTHING if last else cast(AbstractContextManager[None], self._wrapped.no_sync())
        if isinstance(self._wrapped, FSDPModule):
            self._wrapped.set_requires_gradient_sync(last)
        return _NOTHING


def _mark_when_computed(gradient: Tensor) -> None:
    """A backward pass ends with callbacks in the order in which they came: the first is ours, and then DDP and FSDP2
    wait for what is still on its way to other ranks."""
    torch.autograd.Variable._execution_engine.queue_callback(lambda: CLOCK.mark("backward"))
