"""Traces of chosen steps by torch.profiler: for Perfetto (ui.perfetto.dev), and the same as numbers.

    profiler.trace 10,11,12 writes debugger/trace/steps-10-12-rank-0.json.gz, beside it .txt (operations by time) and
    .summary.json (seconds of computing, of communication that shows, and so on)

Steps that follow each other are one trace. The profiler is on in these steps alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dltrain import storage
from dltrain.data.batch import Batch
from dltrain.debugger.recorder import Guard
from dltrain.hooks.base import Hook, View
from dltrain.profiling.exposure import Kind, Span, exposure
from dltrain.runtime.environment import Environment

_ROWS = 40
"""Operations in the table."""

_TALK = ("nccl", "gloo:", "mpi:")
_COPY = ("memcpy", "memset")


def windows(steps: Iterable[int]) -> list[tuple[int, int]]:
    """First and last steps of those that follow each other: [1, 2, 5] to [(1, 2), (5, 5)]."""
    found: list[tuple[int, int]] = []
    for step in sorted(set(steps)):
        if found and found[-1][1] == step - 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


class Traces(Hook):
    """On the ranks that trace ``steps``; writes into ``folder``."""

    def __init__(self, steps: Iterable[int], folder: Path, environment: Environment, guard: Guard) -> None:
        self._windows = dict(windows(steps))
        self._folder, self._rank, self._guard = folder, environment.rank, guard
        self._running: profile | None = None
        self._first = self._last = 0
        self._began = 0.0

    def step_start(self, trainer: View, batch: Batch) -> None:
        last = self._windows.get(trainer.step + 1)
        if last is not None and self._running is None:
            activities = [ProfilerActivity.CPU]
            if trainer.engine.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities, acc_events=True)
            self._running.start()
            self._first, self._last, self._began = trainer.step + 1, last, time.perf_counter()

    def step_end(self, trainer: View) -> None:
        ends = trainer.step >= self._last or trainer.step == trainer.total_steps  # an evaluation follows the last step
        if self._running is not None and ends:
            self._last = trainer.step
            self._finish(trainer.engine.device)

    def close(self) -> None:
        if self._running is not None:  # the run ended within the window
            self._finish(torch.device("cpu"))

    def _finish(self, device: torch.device) -> None:
        running, self._running = self._running, None
        assert running is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else what the last step does would be cut off
        seconds = time.perf_counter() - self._began
        running.stop()
        self._guard("traces", partial(self._write, running, seconds))

    def _write(self, running: profile, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{self._last}-rank-{self._rank}"
        running.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        events = list(running.events() or ())  # type: ignore[no-untyped-call]
        on_device = any(event.device_type == DeviceType.CUDA for event in events)
        sort = "self_cuda_time_total" if on_device else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=sort, row_limit=_ROWS)
        storage.write(str(self._folder / f"{name}.txt"), table.encode())
        summary = {"steps": self._last - self._first + 1, **summed_up(events, seconds, on_device)}
        storage.write(str(self._folder / f"{name}.summary.json"), (json.dumps(summary, indent=1) + "\n").encode())


def summed_up(events: list[Any], seconds: float, on_device: bool) -> dict[str, float]:
    """Seconds by kind (:class:`~dltrain.profiling.exposure.Exposure`) of a profiler's events; of the device's own,
    where there is one."""
    spans = list(_spans(events, on_device))
    if not spans:
        return exposure([], 0.0, seconds).as_dict()
    begin = min(span.start for span in spans)
    return exposure(spans, begin, begin + seconds).as_dict()


def _spans(events: list[Any], on_device: bool) -> Iterator[Span]:
    wanted = DeviceType.CUDA if on_device else DeviceType.CPU
    for event in events:
        name = event.name.lower()
        kind: Kind = "compute"
        if any(word in name for word in _TALK):
            kind = "communication"
        elif any(word in name for word in _COPY):
            kind = "copy"
        elif not on_device and not name.startswith("aten::"):
            continue  # a frame around others
        if event.device_type == wanted:
            yield Span(kind, event.time_range.start / 1e6, event.time_range.end / 1e6)
