"""Rules about what the machine does meanwhile, of samples of CPU, disk and GPUs (:mod:`dltrain.debugger.system`).

``patience`` and ``window`` are numbers of samples, of which there is one for each ``profiler.system`` seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.seen import Seen

_MOST = 10
"""Times as many samples as a rule waits for are kept."""

_LEVELS = np.linspace(0, 100, 11)
"""Of utilisation, for histograms of it."""


@dataclass
class _Samples(Rule):
    """Looks at all samples so far whenever ``window`` new ones have come, after ``patience``."""

    when: ClassVar = ("system",)
    patience: int = 1000
    window: int = 500
    _kept: list[dict[str, Any]] = field(default_factory=list, repr=False)
    _since: int = field(default=0, repr=False)

    def needs(self) -> Needs:
        return Needs(system=True)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        self._kept += seen.observed["system"]
        self._since += len(seen.observed["system"])
        if len(self._kept) < self.patience or self._since < self.window:
            return None
        self._since = 0
        del self._kept[: -_MOST * max(self.patience, self.window)]
        return self.look(seen.step)

    def look(self, step: int) -> Iterable[Finding]:
        """What is wrong with the samples."""
        raise NotImplementedError(f"{type(self).__name__} must say in look() what is wrong")

    def of(self, name: str) -> Array:
        """One number of the last ``window`` samples."""
        return np.array([sample[name] for sample in self._kept[-self.window :]], dtype=np.float64)

    def gpus(self, name: str, every: bool = False) -> Array:
        """One number of each GPU, float64 [samples, GPUs], of the last ``window`` samples or of all."""
        kept = self._kept if every else self._kept[-self.window :]
        return np.array([[gpu[name] for gpu in sample["gpus"]] for sample in kept], dtype=np.float64)


@dataclass
class BatchSize(_Samples):
    """CPU, GPUs and their memory are all below their thresholds, in percent, at their 95th percentile."""

    why: ClassVar = "The machine could do more in the same time."
    advice: ClassVar = "Raise data.global_batch_size or parallel.micro_batch, or take a smaller instance."
    cpu_threshold_p95: float = 70.0
    gpu_threshold_p95: float = 70.0
    gpu_memory_threshold_p95: float = 70.0

    def look(self, step: int) -> Iterator[Finding]:
        used, memory = self.gpus("used"), self.gpus("memory")
        if not used.size:
            return
        found = {"cpu": self.of("cpu"), "gpu": used, "memory": memory}
        p95 = {name: float(np.percentile(values, 95)) for name, values in found.items()}
        limits = (self.cpu_threshold_p95, self.gpu_threshold_p95, self.gpu_memory_threshold_p95)
        if all(value < limit for value, limit in zip(p95.values(), limits, strict=True)):
            what = f"CPU is at {p95['cpu']:.0f} %, GPUs at {p95['gpu']:.0f} % and their memory at {p95['memory']:.0f} %"
            yield self.finding(step, f"{what} (95th percentiles)", (), **p95)


@dataclass
class _Bottleneck(_Samples):
    threshold: float = 50.0
    gpu_threshold: float = 10.0

    def busy(self, sample: dict[str, Any]) -> str:
        """What else is busy in a sample, for a sentence; empty where nothing is."""
        raise NotImplementedError(f"{type(self).__name__} must say in busy() what GPUs wait for")

    def look(self, step: int) -> Iterator[Finding]:
        used = self.gpus("used", every=True)
        if not used.size:
            return
        beside = [self.busy(sample) for sample in self._kept]
        idle = [what for what, gpus in zip(beside, used.mean(1), strict=True) if what and gpus < self.gpu_threshold]
        share = 100 * len(idle) / len(beside)
        if share > self.threshold:
            yield self.finding(step, f"GPUs idle {idle[-1]} in {share:.0f} % of the time", share=share)


@dataclass
class CPUBottleneck(_Bottleneck):
    """In more than ``threshold`` percent of the time GPUs are below ``gpu_threshold`` while a core is above
    ``cpu_threshold``."""

    why: ClassVar = "GPUs wait for what the CPU prepares."
    advice: ClassVar = "Raise data.workers, decode on the GPU, or take an instance with more cores."
    cpu_threshold: float = 90.0

    def busy(self, sample: dict[str, Any]) -> str:
        return "beside a busy CPU" if sample["core"] > self.cpu_threshold else ""


@dataclass
class IOBottleneck(_Bottleneck):
    """In more than ``threshold`` percent of the time GPUs are below ``gpu_threshold`` while more than ``io_threshold``
    percent of the CPU's time is waiting for disks."""

    why: ClassVar = "GPUs wait for data that are being read."
    advice: ClassVar = "Raise storage.cache or data.workers, or put the data nearer, into larger shards."
    io_threshold: float = 50.0

    def busy(self, sample: dict[str, Any]) -> str:
        return "while disks are read" if sample["io_wait"] > self.io_threshold else ""


@dataclass
class Dataloader(_Samples):
    """Loader processes are fewer than ``min_threshold`` or more than ``max_threshold`` percent of the cores."""

    why: ClassVar = "Too few leave cores idle, too many take them from each other."
    advice: ClassVar = "Set data.workers to the cores of a rank, or a little less."
    patience: int = 10
    window: int = 10
    min_threshold: float = 70.0
    max_threshold: float = 200.0

    def look(self, step: int) -> Iterator[Finding]:
        workers, cores = float(np.median(self.of("workers"))), self._kept[-1]["cores"]
        percent = 100 * workers / cores
        if not self.min_threshold <= percent <= self.max_threshold:
            what = f"{workers:.0f} processes load data on {cores} cores"
            yield self.finding(step, what, workers=workers, cores=float(cores))


@dataclass
class GPUMemoryIncrease(_Samples):
    """A GPU's memory, as a mean over ``window`` samples, grew by more than ``increase`` percentage points."""

    why: ClassVar = "Memory that grows will run out."
    advice: ClassVar = "Look for tensors that are kept with their graph, such as losses added up without detach()."
    increase: float = 5.0
    window: int = 10

    def look(self, step: int) -> Iterator[Finding]:
        memory = self.gpus("memory", every=True)[self.patience - self.window :]
        if not memory.size:
            return
        first, last = memory[: self.window].mean(0), memory[-self.window :].mean(0)
        grown = float((last - first).max())
        if grown > self.increase:
            place = int((last - first).argmax())
            yield self.finding(
                step, f"the memory of GPU {place} grew by {grown:.1f} % of all", (f"GPU {place}",), grown=grown
            )


@dataclass
class LoadBalancing(_Samples):
    """Histograms of two GPUs' utilisation differ by more than ``threshold``: 0 where they are alike, 1 where they have
    nothing in common."""

    why: ClassVar = "All wait for the GPU that has most to do."
    advice: ClassVar = "Look for work on some ranks alone, and at the stages of a pipeline."
    threshold: float = 0.5

    def look(self, step: int) -> Iterator[Finding]:
        used = self.gpus("used", every=True)
        if not used.size or used.shape[1] < 2:
            return
        counts = np.array([np.histogram(used[:, gpu], _LEVELS)[0] for gpu in range(used.shape[1])]) / len(used)
        distance = np.abs(counts[:, None] - counts[None]).sum(-1) / 2
        one, other = np.unravel_index(distance.argmax(), distance.shape)
        if distance.max() > self.threshold:
            where = (f"GPU {one}", f"GPU {other}")
            means = f"{used[:, one].mean():.0f} and {used[:, other].mean():.0f} %"
            what = f"{where[0]} and {where[1]} are used differently ({means})"
            yield self.finding(step, what, where, distance=float(distance.max()))


@dataclass
class LowGPUUtilization(_Samples):
    """A GPU's utilisation is below ``threshold_p95`` percent at its 95th percentile, or, where it is not, below
    ``threshold_p5`` at its 5th."""

    why: ClassVar = "A GPU that waits is paid for."
    advice: ClassVar = "Look where the time goes (dltrain debug show), and raise the batch size or data.workers."
    threshold_p95: float = 70.0
    threshold_p5: float = 10.0

    def look(self, step: int) -> Iterator[Finding]:
        used = self.gpus("used")
        for gpu in range(used.shape[1] if used.size else 0):
            p5, p95 = (float(value) for value in np.percentile(used[:, gpu], (5, 95)))
            if p95 < self.threshold_p95:
                yield self.finding(step, f"GPU {gpu} is at {p95:.0f} % at most", (f"GPU {gpu}",), p95=p95)
            elif p5 < self.threshold_p5:
                what = f"GPU {gpu} swings between {p5:.0f} and {p95:.0f} %"
                yield self.finding(step, what, (f"GPU {gpu}",), p5=p5, p95=p95)


@dataclass
class OverallSystemUsage(Rule):
    """Never finds anything; :meth:`report` sums up how the machine was used."""

    when: ClassVar = ("system",)
    why: ClassVar = "It is a summary."
    _kept: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def needs(self) -> Needs:
        return Needs(system=True)

    def update(self, seen: Seen) -> Iterable[Finding]:
        self._kept += seen.observed["system"]
        return ()

    def report(self) -> dict[str, dict[str, float]]:
        """Mean, median, 95th and 99th percentiles of each number, and of all GPUs."""
        columns: dict[str, list[float]] = {}
        for sample in self._kept:
            for name in ("cpu", "core", "io_wait", "memory", "read", "written", "sent", "received"):
                columns.setdefault(name, []).append(sample[name])
            for gpu in sample["gpus"]:
                columns.setdefault("gpu", []).append(gpu["used"])
                columns.setdefault("gpu_memory", []).append(gpu["memory"])
        return {name: summed_up(values) for name, values in columns.items()}


def summed_up(values: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles of some numbers."""
    found = np.array(list(values), dtype=np.float64)
    p50, p95, p99 = np.percentile(found, (50, 95, 99))
    return {"mean": float(found.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}
