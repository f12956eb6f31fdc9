"""Measuring loops side by side: the same number of steps of each in turn, in one process, over several rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Loop(Protocol):
    """A loop that can be measured."""

    model: nn.Module

    def prepare(self, steps: int) -> Callable[[], object]:
        """What trains for ``steps`` when called; making it is not part of what is measured."""
        ...


def interleave(loops: Mapping[str, Loop], steps: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that ``steps`` steps of each loop took, by round.

    Every second round goes backwards (A B, B A, A B ...), so that a machine that slows down or speeds up
    during the measurement favours none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops) if number % 2 == 0 else reversed(list(loops)):
            seconds[name].append(_timed(loops[name].prepare(steps), device))
    return seconds


def warm_up(ours: Loop, bare: Loop, steps: int, limit: float) -> float:
    """Train both for ``steps`` and return how far their weights are apart, relative to how far they came.

    Both start from the same weights and see the same batch, so that 0 is the same training, and some 1.4 two trainings
    that have nothing to do with each other. Raises ``AssertionError`` above ``limit``: nothing would be compared.
    """
    start = _weights(bare)
    if any(not torch.equal(a, b) for a, b in zip(start, _weights(ours), strict=True)):
        raise AssertionError("the two loops start from different weights; give both the same seed and model")
    for loop in (ours, bare):
        loop.prepare(steps)()
    end = _weights(bare)
    difference = _distance(end, _weights(ours)) / _distance(end, start)
    if not difference <= limit:
        raise AssertionError(
            f"after {steps} equal steps the weights of the two loops are {difference:.3g} apart (> {limit})"
        )
    return difference


def _timed(body: Callable[[], object], device: torch.device) -> float:
    gc.collect()  # neither pays for what the other left behind
    _finish(device)
    started = time.perf_counter()
    body()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weights(loop: Loop) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in loop.model.parameters()]


def _distance(some: list[Tensor], others: list[Tensor]) -> float:
    squares = [(a - b).double().square().sum() for a, b in zip(some, others, strict=True)]
    return float(torch.stack(squares).sum().sqrt())
