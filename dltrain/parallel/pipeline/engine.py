"""The engine of a pipeline: each rank has some stages of the model and sends activations and gradients to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.mesh import Mesh
from dltrain.parallel.forward import autocast, inputs_of, joined, losses_of
from dltrain.parallel.pipeline.channels import Shape, Wires
from dltrain.parallel.pipeline.executor import Executor, Inputs
from dltrain.parallel.pipeline.parts import Parts
from dltrain.parallel.pipeline.schedule import Schedule, build, forward_only, micro_batches
from dltrain.parallel.pipeline.simulation import simulate
from dltrain.parallel.settling import patiently, without_trace
from dltrain.parallel.update import Updating
from dltrain.task import Loss, Task


class PipelineEngine(Updating):
    """Stages of a pipeline, with split layers or without, each replicated or sharded by FSDP2, or on its own."""

    def __init__(
        self,
        task: Task,
        parts: Parts,
        optimizer: Optimizer,
        config: Config,
        device: torch.device,
        mesh: Mesh,
        names: Sequence[str],
    ) -> None:
        super().__init__(parts.model, optimizer, config, mesh, device, names)
        self._task, self._parts = task, parts
        self._parallel, self._precision = config.parallel, config.precision
        self.micro_batch = config.parallel.micro_batch
        self._has_losses = parts.owners[-1] == mesh.pp_rank
        self.counts = mesh.counts and self._has_losses
        axis = mesh.pipeline_group()
        assert axis is not None
        self._wires = Wires(axis, device)
        self._executor = Executor(parts.stages, self._wires, _reduce_gradients)
        self._shapes: dict[Any, list[list[Shape]]] = {}

    def forward_backward(self, batch: Batch, count: Tensor) -> Loss:
        pieces = self._pieces(batch)
        inputs = [inputs_of(self._task, piece, self._precision) for piece in pieces]
        shapes = self._shapes_of(inputs[0])
        self._set_mode(training=True)
        losses: list[Tensor] = []

        def finish(outputs: Any, place: int) -> Tensor:
            found = self._losses(outputs, pieces[place])[1]
            self.sample_losses.add(pieces[place], found)
            loss = torch.dot(found, pieces[place].weight)
            losses.append(loss.detach())
            return loss

        # FSDP2 averages over data ranks; the sum is wanted, for `count` is the global one
        seed = self._seed(count)
        schedule = self._schedule(len(pieces))
        if self.bubble is None:
            self.bubble = simulate(schedule).bubble
        with self._autocast():
            self._executor.train(schedule, shapes, inputs, finish, seed)
        self._complete_gradients()
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total = total + loss
        return Loss(total, count)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Any, Tensor]:
        pieces = self._pieces(batch)
        inputs = [inputs_of(self._task, piece, self._precision) for piece in pieces]
        shapes = self._shapes_of(inputs[0])
        self._set_mode(training=False)
        parts: list[tuple[Any, Tensor]] = []

        def finish(outputs: Any, place: int) -> Tensor:
            outputs, losses = self._losses(outputs, pieces[place])
            parts.append((self._task.predictions(outputs, pieces[place]), losses))
            return losses

        with self._autocast():
            self._executor.evaluate(forward_only(self._parts.owners, len(pieces)), shapes, inputs, finish)
        if not parts:
            return None, torch.empty(0, device=self.device)
        outputs, losses = joined(parts)
        return _first(outputs, len(batch)), losses[: len(batch)]

    def settle(self, peek: Callable[[], Batch]) -> None:
        """Stages learn what they will be given, and are compiled, so that the first step is like all others."""
        if not self._precision.compile:
            self._shapes_of(inputs_of(self._task, self._pieces(peek())[0], self._precision))
            return
        groups = [*self.mesh.groups(), *self._wires.groups]
        with patiently(groups, self._parallel.timeout), without_trace(self.model, self.optimizer, self.device):
            self.forward_backward(peek(), torch.ones((), device=self.device))

    def _pieces(self, batch: Batch) -> list[Batch]:
        """Micro-batches of one size, on the device; what is missing in the last one is filled with weight 0."""
        wanted = self._parts.size or self._parallel.micro_batch
        number, size = micro_batches(len(batch), wanted, len(self._parts.owners), self.mesh.pp)
        return list(batch.to(self.device).padded(number * size).split(size))

    def _schedule(self, pieces: int) -> Schedule:
        return build(self._parallel.schedule, self.mesh.pp, pieces, self._parallel.stages_per_rank)

    def _shapes_of(self, inputs: Inputs) -> list[list[Shape]]:
        """Of what stages are given for a piece with such inputs."""
        key = tuple((tuple(value.shape), value.dtype) for value in inputs if isinstance(value, Tensor))
        if key not in self._shapes:
            self._set_mode(training=False)
            with self._autocast():
                self._shapes[key] = self._executor.shapes(self._parts.owners, inputs)
        return self._shapes[key]

    def _set_mode(self, training: bool) -> None:
        for stage in self._parts.stages.values():
            if stage.training != training:
                stage.train(training)
            if training and isinstance(stage, FSDPModule):
                # several backward passes follow, and the weights' part may come later than the inputs'
                stage.set_is_last_backward(False)
                stage.set_reshard_after_backward(False)
                stage.set_requires_gradient_sync(False)

    def _losses(self, outputs: Any, piece: Batch) -> tuple[Any, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            return losses_of(self._task, outputs, piece, self._precision)

    def _autocast(self) -> Any:
        sharded = any(isinstance(stage, FSDPModule) for stage in self._parts.stages.values())
        return autocast(self.device, self._precision, sharded)


def _reduce_gradients(stage: nn.Module) -> None:
    """What FSDP2 does after a last backward pass: reduce gradients over data ranks, and free the gathered weights.

    Its own hooks cannot know which pass is the last: gradients of weights may come outside of any.
    """
    if not isinstance(stage, FSDPModule):
        return
    stage.set_is_last_backward(True)
    stage.set_reshard_after_backward(True)
    stage.set_requires_gradient_sync(True)
    state = fully_shard.state(stage)  # type: ignore[attr-defined]
    for each in state._state_ctx.all_states:
        for group in _groups(each):
            group.post_backward()
    state._root_post_backward_final_callback()


def _groups(state: Any) -> list[Any]:
    """FSDP2's groups of parameters; torch 2.12 allows several for a module."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _first(outputs: Any, samples: int) -> Any:
    return tree_map(lambda value: value[:samples], outputs)
