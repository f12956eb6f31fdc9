"""Values of a step, reduced over ranks once and read on the host later.

A step's one reduction carries: the count of this step, the loss sum of the step before (its own is not known yet), and
one number for each kind of request. What it brings and the gradient norm go to the host without waiting for the device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.hooks.base import Request


@dataclass(frozen=True)
class Reading:
    """What is known of a step once it was read; equal on every rank."""

    step: int
    position: int
    learning_rate: float
    loss: float
    norm: float
    requests: Request

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass
class _Pending:
    step: int
    position: int
    learning_rate: float
    values: Tensor  # float64: count, loss sum of the step before, requests, norm
    ready: torch.cuda.Event | None


class Readings:
    """The step's reduction and the queue of values on their way to the host."""

    def __init__(self, device: torch.device, kinds: int) -> None:
        self._device, self._kinds = device, kinds
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._queue: deque[_Pending] = deque()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._members = list(Request)

    def reduce(self, count: Tensor, requests: Request) -> Tensor:
        """Float64 [2 + kinds] on the device, summed over ranks. ``count`` is a scalar on the CPU."""
        flags = [float(member in requests) for member in self._members] if requests else [0.0] * self._kinds
        vector = torch.tensor([float(count), 0.0, *flags], dtype=torch.float64, pin_memory=self._device.type == "cuda")
        vector = vector.to(self._device, non_blocking=True)
        vector[1] = self._loss_sum
        if self._distributed:
            dist.all_reduce(vector)
        return vector

    def push(
        self, step: int, position: int, learning_rate: float, reduced: Tensor, loss_sum: Tensor, norm: Tensor
    ) -> None:
        """Queue a step's values."""
        self._loss_sum = loss_sum
        values, ready = self._to_host(torch.cat([reduced, norm.reshape(1)]))
        self._queue.append(_Pending(step, position, learning_rate, values, ready))

    def pop(self, up_to: int) -> Iterator[Reading]:
        """Readings of the steps up to ``up_to``; one needs its successor in the queue, for that carries its loss."""
        while len(self._queue) > 1 and self._queue[0].step <= up_to:
            first = self._queue.popleft()
            count, _, *flags, norm = self._values(first)
            loss_sum = self._values(self._queue[0])[1]
            asked = Request(0)
            for member, flag in zip(self._members, flags, strict=True):
                asked |= member if flag else Request(0)
            loss = loss_sum / count if count else math.nan
            yield Reading(first.step, first.position, first.learning_rate, loss, norm, asked)

    def flush(self) -> list[Reading]:
        """Readings of every step so far; collective, for the last step's loss takes a reduction of its own."""
        if not self._queue:
            return []
        last = self._queue[-1]
        reduced = self.reduce(torch.zeros(()), Request(0))
        self.push(last.step + 1, last.position, 0.0, reduced, self._loss_sum, torch.zeros((), device=self._device))
        readings = list(self.pop(last.step))
        self._queue.clear()
        return readings

    def _to_host(self, values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return host, ready

    @staticmethod
    def _values(pending: _Pending) -> list[float]:
        if pending.ready is not None:
            pending.ready.synchronize()
        return pending.values.tolist()
