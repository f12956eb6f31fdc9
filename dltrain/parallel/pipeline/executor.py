"""Running a schedule: the passes of one rank's stages, in order, and what goes in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.parallel.pipeline.channels import Cargo, Channels, Shape, Values, Wires
from dltrain.parallel.pipeline.schedule import Action, Schedule
from dltrain.runtime.step_clock import CLOCK

Shapes = Sequence[Sequence[Shape]]

Inputs = tuple[Any, ...]
"""The model's arguments for one piece."""

Finish = Callable[[Any, int], Tensor]
"""From what the last stage returned, and the piece's number, to the loss to go back from, a scalar."""


@dataclass
class Pass:
    """What a forward pass leaves for its backward pass: leaves that went in, tensors that came out, their gradients."""

    leaves: Values
    outputs: Values
    gradients: Values = ()
    groups: Any = None


@dataclass
class Run:
    """One batch on its way through this rank's stages."""

    schedule: Schedule
    channels: Channels
    inputs: Sequence[Inputs]
    finish: Finish
    scale: Tensor
    local: dict[tuple[Cargo, int, int], Values] = field(default_factory=dict)
    passes: dict[tuple[int, int], Pass] = field(default_factory=dict)


class Executor:
    """This rank's ``stages`` by their number in the pipeline.

    ``stage_done`` is called when a stage has had its last backward pass of a batch.
    """

    def __init__(self, stages: Mapping[int, nn.Module], wires: Wires, stage_done: Callable[[nn.Module], None]) -> None:
        self._stages, self._wires, self._stage_done = stages, wires, stage_done

    def train(
        self,
        schedule: Schedule,
        shapes: Sequence[Sequence[Shape]],
        inputs: Sequence[Inputs],
        finish: Finish,
        scale: Tensor,
    ) -> None:
        """Forward and backward of every piece; gradients are added up in the parameters, times ``scale``."""
        run = Run(schedule, Channels(schedule, self._wires, shapes), inputs, finish, scale)
        actions = schedule.actions[self._wires.place]
        last = {action.stage: place for place, action in enumerate(actions) if action.kind != "F"}
        steps = {"F": self._forward, "B": self._backward, "I": self._backward_input, "W": self._backward_weight}
        for place, action in enumerate(actions):
            steps[action.kind](run, action)
            CLOCK.mark("forward" if action.kind == "F" else "backward")
            if last[action.stage] == place:
                self._stage_done(self._stages[action.stage])
        run.channels.finish()
        CLOCK.mark("communication")

    def evaluate(self, schedule: Schedule, shapes: Shapes, inputs: Sequence[Inputs], finish: Finish) -> None:
        """Forward of every piece, under ``torch.no_grad``; ``schedule`` has nothing else."""
        run = Run(schedule, Channels(schedule, self._wires, shapes), inputs, finish, torch.ones(()))
        for action in schedule.actions[self._wires.place]:
            self._forward(run, action)
        run.channels.finish()

    def shapes(self, owners: Sequence[int], inputs: Inputs) -> list[list[Shape]]:
        """What each stage is given for one piece, found by passing zeros from stage to stage; collective."""
        shapes: list[list[Shape]] = [[]]
        for number, owner in enumerate(owners[:-1]):
            found: list[Any] = [None]
            if number in self._stages:
                zeros = tuple(shape.empty(self._wires.device).zero_() for shape in shapes[number])
                with torch.no_grad():
                    returned = self._stages[number](zeros if number else inputs, inputs)
                found = [[Shape.of(value) for value in as_values(returned)]]
            torch.distributed.broadcast_object_list(found, group=self._wires.axis, group_src=owner)
            shapes.append(found[0])
        return shapes

    def _forward(self, run: Run, action: Action) -> None:
        _, number, piece = action
        values: Inputs = run.inputs[piece]
        leaves: Values = ()
        if number:
            leaves = values = tuple(map(_as_leaf, self._arrived(run, "activations", number, piece)))
        returned = self._stages[number](values, run.inputs[piece])
        last = number == run.schedule.stages - 1
        outputs = (run.finish(returned, piece),) if last else as_values(returned)
        if torch.is_grad_enabled():
            if run.schedule.splits and number:
                outputs = tuple(value.clone() if value._is_view() else value for value in outputs)
            run.passes[number, piece] = Pass(leaves, outputs)
        if not last:
            self._leave(run, "activations", number + 1, piece, tuple(value.detach() for value in outputs))

    def _backward(self, run: Run, action: Action) -> None:
        _, number, piece = action
        done = run.passes.pop((number, piece))
        outputs, gradients = _with_gradients(done.outputs, self._gradients(run, number, piece))
        if outputs:
            torch.autograd.backward(outputs, gradients)
        self._send_back(run, number, piece, done.leaves)

    def _backward_input(self, run: Run, action: Action) -> None:
        from torch.distributed.pipelining._backward import stage_backward_input  # slow to import

        _, number, piece = action
        done = run.passes[number, piece]
        outputs, gradients = _with_gradients(done.outputs, self._gradients(run, number, piece))
        weights = [weight for weight in self._stages[number].parameters() if weight.requires_grad]
        _, done.groups = stage_backward_input(list(outputs), list(gradients), list(done.leaves), iter(weights))
        self._send_back(run, number, piece, done.leaves)
        done.leaves = done.outputs = ()

    def _backward_weight(self, run: Run, action: Action) -> None:
        from torch.distributed.pipelining._backward import stage_backward_weight

        _, number, piece = action
        weights = [weight for weight in self._stages[number].parameters() if weight.requires_grad]
        stage_backward_weight(iter(weights), run.passes.pop((number, piece)).groups)
        for weight in weights:
            _lay_out_gradient(weight)

    def _gradients(self, run: Run, number: int, piece: int) -> Values:
        if number == run.schedule.stages - 1:
            return (run.scale,)
        return self._arrived(run, "gradients", number, piece)

    def _send_back(self, run: Run, number: int, piece: int, leaves: Values) -> None:
        if number:
            floating = [leaf for leaf in leaves if leaf.is_floating_point()]
            gradients = tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in floating)
            self._leave(run, "gradients", number - 1, piece, gradients)

    def _leave(self, run: Run, cargo: Cargo, stage: int, piece: int, values: Values) -> None:
        if stage in self._stages:
            run.local[cargo, stage, piece] = values
        else:
            run.channels.send(cargo, stage, piece, values)

    def _arrived(self, run: Run, cargo: Cargo, stage: int, piece: int) -> Values:
        here = run.local.pop((cargo, stage, piece), None)
        if here is not None:
            return here
        arrived = run.channels.receive(cargo, stage, piece)
        CLOCK.mark("pipeline")
        return arrived


def as_values(returned: Any) -> Values:
    """What a stage returned as a tuple of tensors."""
    values = returned if isinstance(returned, tuple) else (returned,)
    for value in values:
        if not isinstance(value, Tensor):
            raise UserError(
                f"a stage of the pipeline returned {type(value).__name__}; what goes from stage to stage must be a "
                "tensor or a tuple of tensors"
            )
    return values


def _lay_out_gradient(weight: Tensor) -> None:
    """In memory as its weight lies: autograd sees to it by itself, and fused optimizers go through both in one line."""
    if weight.grad is not None and weight.grad.stride() != weight.stride():
        weight.grad = torch.empty_like(weight, dtype=weight.grad.dtype).copy_(weight.grad)


def _as_leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(torch.is_grad_enabled() and value.is_floating_point())


def _with_gradients(outputs: Values, gradients: Values) -> tuple[Values, Values]:
    """Outputs that gradients flow from, and those gradients; there are gradients for floating-point outputs alone."""
    floating = [output for output in outputs if output.is_floating_point()]
    pairs = [(output, gradient) for output, gradient in zip(floating, gradients, strict=True) if output.requires_grad]
    return tuple(output for output, _ in pairs), tuple(gradient for _, gradient in pairs)
