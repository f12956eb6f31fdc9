"""DeepSpeed behind the engine's protocol: data parallel, with ZeRO's shards of optimizer, gradients and weights.

DeepSpeed reduces, clips and updates; the model's forward pass, the loss and its weighting are those of the plain
engine, and the optimizer is the one that every engine has. Its own batch arithmetic, schedules and checkpoints stay
unused. Precision bf16 is DeepSpeed's `torch_autocast` without modules of lower precision: weights and reduction in
fp32, as under DDP.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.optimizer import build_optimizer, set_learning_rate
from dltrain.parallel.deepspeed.settings import deepspeed_settings
from dltrain.parallel.deepspeed.state import ZeroState
from dltrain.parallel.gradients import clip, gradients_of
from dltrain.parallel.pieces import Piece
from dltrain.parallel.plain import PlainEngine
from dltrain.runtime.process_group import join_alone
from dltrain.task import Task


def deepspeed_engine(task: Task, model: nn.Module, config: Config, mesh: Mesh, device: torch.device) -> DeepSpeedEngine:
    """``model`` under DeepSpeed as ``config.parallel.deepspeed`` wants it, on all ranks of the mesh; collective.

    The model is whole on every rank before ZeRO shards it. Raises :class:`UserError` where DeepSpeed is missing or its
    JSON says something else than the config.
    """
    if config.precision.compile and config.parallel.deepspeed.stage == 3:
        raise UserError(
            "precision.compile is true and parallel.deepspeed.stage is 3, whose hooks cannot be compiled "
            "with it; take stage 2, or parallel.engine plain with parallel.dp_shard -1"
        )
    deepspeed = import_deepspeed(device)
    settings = deepspeed_settings(config, mesh.data_ranks, device)
    if not dist.is_initialized():
        join_alone(device)
    os.environ.setdefault("LOCAL_RANK", str(mesh.environment.local_rank))  # it takes its GPU from there
    optimizer = build_optimizer(model, config.optim)
    with redirect_stdout(sys.stderr):
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return DeepSpeedEngine(task, model, wrapped, optimizer, config, device, mesh)


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for this kind of device, its log on standard error. Raises :class:`UserError` where it is missing."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it guesses otherwise, and asks every vendor's package
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise UserError(
            f"parallel.engine is 'deepspeed', which cannot be imported ({error}); "
            "after torch: pip install --no-build-isolation 'dltrain[deepspeed]'"
        ) from None
    if get_accelerator().device_name() != device.type:
        raise UserError(
            f"DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']!r} and run.device is {device.type!r}; unset the variable"
        )
    if device.type == "cpu":
        # it would probe compilers and then compile a shared-memory all-reduce for half a minute; gloo has one
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is for results
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


class DeepSpeedEngine(PlainEngine):
    """ZeRO 0 to 3, with offload or without: every rank runs the whole forward and backward.

    Under stage 3 :meth:`named_parameters` gives weights of size 0 between uses. A parameter that got no gradient is
    updated as if it were 0, so that it decays; under the other engines it is left alone.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        wrapped: Any,
        optimizer: Optimizer,
        config: Config,
        device: torch.device,
        mesh: Mesh,
    ) -> None:
        super().__init__(task, model, wrapped, optimizer, config, device, mesh)
        self._deepspeed = wrapped
        self._zero = ZeroState(model, wrapped, optimizer) if config.parallel.deepspeed.stage else None

    def step(self, learning_rate: float, max_norm: float) -> Tensor:
        """As the protocol says; DeepSpeed looks at the norm on the host."""
        set_learning_rate(self.optimizer, learning_rate)
        norm = self._step_replicas(max_norm) if self._zero is None else self._step_shards(max_norm)
        self._sync_buffers(norm)
        return norm

    def pieces(self, kind: str) -> Iterator[Piece]:
        """Under ZeRO whole, on every rank, and rank 0 counts: its shards have no names."""
        if self._zero is None:
            yield from super().pieces(kind)
            return
        for name, tensor in self._zero.tensors(kind):
            yield Piece(name, tensor.detach(), self.mesh.environment.is_main, tensor)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return super().gradients() if self._zero is None else self._zero.gradients()

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by name, fp32, equal on every rank; DCP writes one copy of each."""
        return super().state_dict() if self._zero is None else self._zero.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._zero is None:
            super().load_state_dict(state)
        else:
            self._zero.load_state_dict(state)

    def _backward(self, loss: Tensor, seed: Tensor) -> None:
        # not divided by DeepSpeed's count of micro-batches: `seed` holds the global count
        self._deepspeed.backward(loss * seed, scale_wrt_gas=False)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Tells DeepSpeed which micro-batch is the last, whatever their number in this step."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _step_shards(self, max_norm: float) -> Tensor:
        """ZeRO's own: it clips, and drops the gradients where their norm is not finite."""
        self._deepspeed.optimizer.clip_grad = max_norm
        self._deepspeed.step()
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _step_replicas(self, max_norm: float) -> Tensor:
        """Stage 0 would take any norm, and clips by the maximum it was built with."""
        gradients = gradients_of(self._parameters)
        norm = self._norm(self._parameters)
        if max_norm:
            clip(gradients, norm, max_norm)
        if math.isfinite(norm.item()):
            self._deepspeed.step()
        else:
            self._deepspeed.zero_grad()
        return norm
