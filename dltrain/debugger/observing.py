"""What is seen of a run beside its tensors, where rules ask for it: the loss of each sample by key, how many samples
each class has, confusion matrices, whether replicas agree, and the parts of steps.

Observations have a kind and a value of plain JSON: they stand in ``Seen.observed``, live and afterwards alike.

    losses     {key: loss}: of samples trained on since the evaluation before
    confusion  {"matrix": [[...]], "names": [...]}: rows are true classes
    replicas   a sentence: what ranks that should hold the same do not
    timeline   {"of": step, "seconds": {part: [of each rank]}}, and "bubble", a share, in a pipeline
    system     [{"time": ..., "cpu": ..., ...}, ...]: samples since the due step before
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.data.batch import Batch
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.sampler import ranks
from dltrain.debugger.shares import Shares
from dltrain.parallel.engine import Engine
from dltrain.runtime.environment import Environment
from dltrain.runtime.on_the_way import OnTheWay
from dltrain.runtime.step_clock import CLOCK, NEVER, PARTS

MOST_KEYS = 50_000
"""Samples whose losses are followed; of more there are, every second one is, or every fourth, and so on."""

MOST_CLASSES = 100_000
"""Integers beyond which a field is no label."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

CLOCK_LAG = 3
"""Steps after which all of a step's parts are over, the same on every rank."""


class Labels:
    """Counts of classes in a batch's integer fields, since the run began."""

    def __init__(self, needs: Needs) -> None:
        self._patterns = [re.compile(each) for each in needs.labels]
        self._counts: dict[str, Tensor] = {}

    @property
    def on(self) -> bool:
        return bool(self._patterns)

    def fields(self, batch: Batch) -> list[str]:
        """Names of the fields that are counted: of integers, one for each sample."""
        wanted = {name for name in batch.fields if any(pattern.search(name) for pattern in self._patterns)}
        return [name for name, values in batch.fields.items() if name in wanted and _is_label(values)]

    def add(self, batch: Batch) -> None:
        """The labels of this rank's samples; on the host."""
        source = batch.host or batch
        for name in self.fields(source):
            labels = source.fields[name][source.position >= 0].long()
            counts = torch.bincount(labels[labels >= 0]).double()
            before = self._counts.get(name)
            self._counts[name] = counts if before is None else _sum(before, counts)

    def put(self, shares: Shares, engine: Engine) -> None:
        """Counts so far, on their way to be added up over ranks; collective, and it waits for the device."""
        device = engine.device
        for name, counts in self._counts.items():
            size = torch.tensor(len(counts), device=device)
            group = engine.mesh.data_group()
            if group is not None:
                dist.all_reduce(size, dist.ReduceOp.MAX, group=group)
            wide = torch.zeros(int(size), dtype=torch.float64, device=device)
            wide[: len(counts)] = counts.to(device)
            shares.add(f"labels/{name}", torch.stack([wide, torch.zeros_like(wide)]))


def _is_label(values: Tensor) -> bool:
    if values.dim() != 1 or values.dtype not in _INTEGERS:
        return False
    return not len(values) or int(values.max()) < MOST_CLASSES


def _sum(one: Tensor, other: Tensor) -> Tensor:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    longer = longer.clone()
    longer[: len(shorter)] += shorter
    return longer


def gathered_losses(engine: Engine, environment: Environment) -> dict[str, float]:
    """Losses of samples by key since last time, of all ranks, on rank 0; collective."""
    mine = engine.sample_losses.taken()  # of all, for they are not to be kept for ever
    mine = mine if engine.counts else {}
    everyone: list[Any] = [mine]
    if ranks() > 1:
        everyone = [None] * ranks() if environment.is_main else []
        dist.gather_object(mine, everyone or None)
    found: dict[str, float] = {}
    for some in everyone:
        found |= some
    thinning = 1
    while len(found) > MOST_KEYS * thinning:
        thinning *= 2
    return {key: loss for key, loss in found.items() if zlib.crc32(key.encode()) % thinning == 0}


def confusion_of(metric: Any) -> dict[str, Any] | None:
    """The confusion matrix of a metric that has one."""
    sums = getattr(metric, "sums", {})
    if "confusion" not in sums:
        return None
    return {"matrix": sums["confusion"].tolist(), "names": list(getattr(metric, "names", ()))}


class Timelines:
    """The parts of due steps, of all ranks: gathered a fixed number of steps later, when they are over."""

    def __init__(self, environment: Environment, engine: Engine) -> None:
        self._place, self._ranks, self._engine = environment.rank, ranks(), engine
        self._due: deque[int] = deque()
        self._parts: dict[int, dict[str, float]] = {}
        self._gathered: deque[tuple[int, int, OnTheWay]] = deque()

    @property
    def next(self) -> int:
        """The first step at which something is to be read."""
        return self._gathered[0][1] if self._gathered else NEVER

    @property
    def waiting(self) -> bool:
        """Whether a step's parts are still to be gathered."""
        return bool(self._due)

    def step_end(self, step: int, timed: bool) -> None:
        """Gathers the parts of a step that is long over; collective, at the same steps on all ranks. ``timed``: this
        step's are to follow."""
        if timed:
            self._due.append(step)
        while self._due and self._due[0] <= step - CLOCK_LAG:
            done = self._due.popleft()
            self._parts |= CLOCK.taken()
            parts = self._parts.pop(done, {})
            table = torch.zeros(self._ranks, len(PARTS), dtype=torch.float64)
            table[self._place] = torch.tensor([parts.get(part, 0.0) for part in PARTS])
            table = table.to(self._engine.device, non_blocking=True)
            if self._ranks > 1:
                dist.all_reduce(table)
            self._gathered.append((done, step, OnTheWay([table], self._engine.device)))

    def read(self, step: int) -> dict[str, Any] | None:
        """What was gathered at this step."""
        if not self._gathered or self._gathered[0][1] > step:
            return None
        done, _, values = self._gathered.popleft()
        table: Array = values.array().reshape(self._ranks, len(PARTS))
        found = {"of": done, "seconds": dict(zip(PARTS, table.T.tolist(), strict=True))}
        return found if self._engine.bubble is None else {**found, "bubble": self._engine.bubble}
