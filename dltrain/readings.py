"""Values of a step, reduced over ranks once and read on the host later.

With several ranks a step's one reduction carries: the count of this step, the loss sum of the step before (its own is
not known yet), and one number for each kind of request. What it brings and the gradient norm go to the host without
waiting for the device. One process alone has nothing to reduce and keeps the same timing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.errors import UserError
from dltrain.hooks.base import NOTHING, Request
from dltrain.runtime.on_the_way import OnTheWay


@dataclass(slots=True)
class Reading:
    """What is known of a step once it was read; equal on every rank. Positions are those before and after the step."""

    step: int
    previous: int
    position: int
    learning_rate: float
    loss: float
    norm: float
    requests: Request
    loss_scale: float = 0.0
    """Of fp16, after the step; 0 without one."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


LEAST_SCALE = 1.0
"""Of fp16's loss scale: below, Megatron-LM's ``min-loss-scale`` and ours, overflow is no longer a matter of scale."""


def refuse_vanished(reading: Reading) -> None:
    """Overflow of fp16 is no fault as long as a smaller loss scale may mend it. Raises :class:`UserError`."""
    if reading.loss_scale < LEAST_SCALE:
        raise UserError(
            f"the gradient of step {reading.step} is not finite at any loss scale down to {reading.loss_scale:g} (loss "
            f"{reading.loss:.4g}); set precision.compute bf16 or fp32, lower optim.learning_rate, or look at the data"
        )


@dataclass(slots=True)
class _Pending:
    step: int
    positions: tuple[int, int]
    learning_rate: float
    requests: Request
    # one rank: count, loss sum, norm; several: count, loss sum of the step before, requests, norm; then the loss scale
    values: OnTheWay
    scaled: bool


class Readings:
    """The step's reduction and the queue of values on their way to the host.

    A rank that sees the samples of another does not count (``counts``): its requests alone are heard.
    """

    def __init__(self, device: torch.device, counts: bool = True) -> None:
        self._device, self._counts = device, counts
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._queue: deque[_Pending] = deque()
        self._members = list(Request)
        self._reduced, self._requests = torch.zeros(()), NOTHING
        self._loss_sum = torch.zeros((), device=device)

    def reduce(self, count: Tensor, requests: Request) -> Tensor:
        """The global count, float32 scalar on the device, from this rank's (a scalar on the CPU); collective."""
        if not self._distributed:
            self._reduced, self._requests = count.to(self._device, non_blocking=True), requests
            return self._reduced
        flags = [float(member in requests) for member in self._members]
        mine = float(count) if self._counts else 0.0
        vector = torch.tensor([mine, 0.0, *flags], dtype=torch.float64, pin_memory=self._device.type == "cuda")
        vector = vector.to(self._device, non_blocking=True)
        if self._counts:
            vector[1] = self._loss_sum
        dist.all_reduce(vector)
        self._reduced = vector
        return vector[0].float()

    def push(
        self,
        step: int,
        positions: tuple[int, int],
        learning_rate: float,
        loss_sum: Tensor,
        norm: Tensor,
        loss_scale: Tensor | None = None,
    ) -> None:
        """Queue the values of the step whose count was reduced last."""
        self._loss_sum = loss_sum
        values = [self._reduced, norm] if self._distributed else [self._reduced, loss_sum, norm]
        values += [] if loss_scale is None else [loss_scale]
        on_the_way = OnTheWay(values, self._device)
        self._queue.append(_Pending(step, positions, learning_rate, self._requests, on_the_way, loss_scale is not None))

    def pop(self, up_to: int) -> Iterator[Reading]:
        """Readings of the steps up to ``up_to``; one needs its successor in the queue, which may carry its loss."""
        while len(self._queue) > 1 and self._queue[0].step <= up_to:
            first = self._queue.popleft()
            numbers = first.values.numbers()
            scale = numbers.pop() if first.scaled else 0.0
            count, loss_sum, *flags, norm = numbers
            requests = first.requests
            if self._distributed:
                loss_sum = self._queue[0].values.numbers()[1]
                requests = self._requests_of(flags) if any(flags) else NOTHING
            loss = loss_sum / count if count else 0.0
            yield Reading(first.step, *first.positions, first.learning_rate, loss, norm, requests, scale)

    def flush(self) -> list[Reading]:
        """Readings of every step so far; collective, for the last step's loss takes a reduction of its own."""
        if not self._queue:
            return []
        last = self._queue[-1]
        self.reduce(torch.zeros(()), NOTHING)
        self.push(last.step + 1, last.positions, 0.0, self._loss_sum, torch.zeros((), device=self._device))
        readings = list(self.pop(last.step))
        self._queue.clear()
        return readings

    def _requests_of(self, flags: list[float]) -> Request:
        asked = NOTHING
        for member, flag in zip(self._members, flags, strict=True):
            asked |= member if flag else NOTHING
        return asked
