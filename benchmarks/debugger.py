"""What the debugger costs: default statistics and default rules, on steps that are due and on those that are not.

The time inside its events is added up while the Trainer trains, which says on a noisy machine what differences of steps
cannot; on a CPU nothing of it goes on afterwards. Off-steps are those of a small model, in microseconds. Due steps are
those of ResNet-18 at batch 64, with the images it was made for and with small ones, in which weights are many beside
the work: as a share of the time of a step, at every step and at every fiftieth.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.case import Case, random_batch, scaled
from benchmarks.ours import OurLoop, config_of
from benchmarks.result import Request, device_kind, spread, store
from dltrain.config import Config, Debugger, Length, Run
from dltrain.debugger.hook import AT_ONCE, Debug
from dltrain.errors import UserError
from dltrain.hooks.base import Hook, View
from dltrain.models.vision import resnet
from dltrain.readings import Reading
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import joined

BATCH, CLASSES = 64, 1000
"""Of ResNet-18."""

SIZES = {"images of 224 pixels": 224, "images of 64 pixels": 64}

OFF_STEPS, ROUNDS, INTERVAL = 1500, 5, 50
EVENTS = ("step_start", "gradients_ready", "step_end", "step_read")

NEVER = Debugger(steps=(1 << 40,))
ALWAYS = Debugger(every=Length.parse("1st"))


class _Seconds:
    """Seconds inside the events of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def counted(self, event: Callable[..., Any], begins: bool) -> Callable[..., Any]:
        def measured(*details: Any) -> Any:
            started = time.perf_counter()
            asked = event(*details)
            if begins:
                self.seconds.append(0.0)
            self.seconds[-1] += time.perf_counter() - started
            return asked

        return measured

    def watch(self, hook: Hook) -> None:
        for name in EVENTS:
            setattr(hook, name, self.counted(getattr(hook, name), begins=name == EVENTS[0]))


class Timed(Debug):
    """Counts the time of its events."""

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__(config, Environment(), folder)
        self.spent = _Seconds()
        self.spent.watch(self)
        activations = self._collector._activations  # which are noted in the forward pass
        setattr(activations, "_take", self.spent.counted(activations._take, begins=False))  # noqa: B010 - a method


class Idle(Hook):
    """Does nothing at the same events: what counting itself takes."""

    def __init__(self) -> None:
        self.spent = _Seconds()
        self.spent.watch(self)

    def step_start(self, trainer: View, batch: Any) -> None:
        return None

    def gradients_ready(self, trainer: View) -> None:
        return None

    def step_end(self, trainer: View) -> None:
        return None

    def step_read(self, trainer: View, reading: Reading) -> None:
        return None


def run(request: Request) -> dict[str, Any]:
    """Measure and store; returns the line that sums it up."""
    steps = 4 if request.quick else 20
    with joined(Config(run=Run(device=request.device)), Environment()) as device:
        if device.type != "cpu":
            raise UserError("benchmark debugger adds up time on the host; on a GPU give --device cpu")
        off, counting = _off_steps(_small(device))
        print(f"off-steps: {off['median']:.1f} microseconds (of rounds {off['min']:.1f} to {off['max']:.1f}), beside "
              f"{counting:.1f} of counting them", flush=True)  # fmt: skip
        due = {name: _due(name, _resnet(pixels, device), steps, off["median"]) for name, pixels in SIZES.items()}
        path = store(request, device, _settings(steps), {"figures": {"off_step_microseconds": off, **due}})
    first = due[next(iter(SIZES))]
    return {
        "benchmark": request.name,
        "device": device_kind(device),
        "off_step_microseconds": off["median"],
        "every_step_percent": first["every_step_percent"]["median"],
        "interval_50_percent": first["interval_50_percent"],
        "result": path,
    }


def _off_steps(case: Case) -> tuple[dict[str, float], float]:
    """Microseconds of an off-step, of several rounds, and those that counting the time takes: a hook that does nothing
    is counted beside, and taken off."""
    rounds, counting = [], []
    config = config_of(case).replace(debugger=NEVER)
    with tempfile.TemporaryDirectory() as folder, closing(Timed(config, Path(folder))) as hook:
        idle = Idle()
        loop = OurLoop(case, [hook, idle])
        for _ in range(ROUNDS):
            hook.spent.seconds, idle.spent.seconds = [], []
            loop.prepare(OFF_STEPS)()
            nothing = _typical(idle.spent.seconds)
            rounds.append(_typical(hook.spent.seconds) - nothing)
            counting.append(nothing)
    return spread(rounds), spread(counting)["median"]


def _typical(seconds: Sequence[float]) -> float:
    """Microseconds of a step: means of as many as the debugger looks at together, and the median of those."""
    blocks = range(AT_ONCE, len(seconds) - AT_ONCE, AT_ONCE)
    return 1e6 * spread([fmean(seconds[start : start + AT_ONCE]) for start in blocks])["median"]


def _due(name: str, case: Case, steps: int, off: float) -> dict[str, Any]:
    """Of one size of images."""
    seconds, whole = _measured(case, ALWAYS, steps)
    every = spread([100 * each / whole for each in seconds])
    fiftieth = every["median"] / INTERVAL + off / 1e4 / whole
    print(f"ResNet-18, {name}: {every['median']:.2f} % of a step of {whole:.2f} s at every step ({every['min']:.2f} to "
          f"{every['max']:.2f}), {fiftieth:.3f} % at every fiftieth", flush=True)  # fmt: skip
    return {"every_step_percent": every, "interval_50_percent": fiftieth, "step_seconds": whole}


def _measured(case: Case, settings: Debugger, steps: int) -> tuple[list[float], float]:
    """Seconds of the debugger in each step but the first ones, and the median seconds of a step without it."""
    config = config_of(case).replace(debugger=settings)
    with tempfile.TemporaryDirectory() as folder, closing(Timed(config, Path(folder))) as hook:
        OurLoop(case, [hook]).prepare(steps + 3)()
        bare = OurLoop(case)
        bare.prepare(2)()
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            bare.prepare(max(1, steps // 3))()
            seconds.append((time.perf_counter() - started) / max(1, steps // 3))
        return hook.spent.seconds[3:], spread(seconds)["median"]


def _small(device: torch.device) -> Case:
    inputs, targets = random_batch((32, 64), 10, device)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    return Case(build, inputs, targets, scaled, device)


def _resnet(pixels: int, device: torch.device) -> Case:
    inputs, targets = random_batch((BATCH, 3, pixels, pixels), CLASSES, device)
    return Case(lambda: resnet.resnet("resnet18", CLASSES), inputs, targets, scaled, device)


def _settings(steps: int) -> dict[str, Any]:
    return {
        "model": f"ResNet-18, batch {BATCH}, {CLASSES} classes",
        "steps": steps,
        "off_steps": OFF_STEPS,
        "threads": torch.get_num_threads(),
        "debugger": ALWAYS.model_dump(mode="json"),
    }
