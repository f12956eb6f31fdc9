"""Snapshots of a CUDA device's memory, for pytorch.org/memory_viz: after chosen steps, and when it runs out."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dltrain.data.batch import Batch
from dltrain.debugger.recorder import Guard
from dltrain.hooks.base import Hook, View
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn

ENTRIES = 100_000
"""Allocations that are remembered."""


class Snapshots(Hook):
    """On every rank; writes ``folder/step-50-rank-0.pickle``, and ``out-of-memory-rank-0.pickle``."""

    def __init__(self, steps: Iterable[int], folder: Path, environment: Environment, guard: Guard) -> None:
        self._steps, self._folder = frozenset(steps), folder
        self._environment, self._guard = environment, guard
        self._recording = self._on_cuda = self._observes = False

    def fit_start(self, trainer: View) -> None:
        device = trainer.engine.device
        if device.type != "cuda":
            if self._steps:
                warn(self._environment, f"profiler.memory: snapshots are of CUDA's memory, and this is {device.type}")
            self._steps = frozenset()
            return
        self._on_cuda = True
        if self._steps:
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
            self._recording = True

    def step_start(self, trainer: View, batch: Batch) -> None:
        if self._on_cuda and not self._observes:  # before the first step memory may run out on purpose
            self._observes = True
            torch._C._cuda_attach_out_of_memory_observer(self._out_of_memory)  # type: ignore[attr-defined]

    def step_end(self, trainer: View) -> None:
        if trainer.step in self._steps:
            self._write(f"step-{trainer.step}")

    def close(self) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _out_of_memory(self, device: int, *sizes: Any) -> None:
        self._write("out-of-memory")

    def _write(self, name: str) -> None:
        target = self._folder / f"{name}-rank-{self._environment.rank}.pickle"
        self._guard("snapshots of memory", partial(_dump, target))


def _dump(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(target))  # type: ignore[no-untyped-call]
