"""Microseconds the Trainer adds to a step of a model so small that little else is left.

Three figures: as it is (no hooks, ``logging.every`` at its default, no clipping; the Trainer measures the gradient norm
all the same), with the hook that writes ``metrics.jsonl``, and with clipping at 1 in both loops. Single process, one
CPU thread. No data is read, and nothing is evaluated or saved.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bare import BareLoop
from benchmarks.case import Case, random_batch, scaled
from benchmarks.ours import OurLoop, config_of
from benchmarks.result import Request, device_kind, spread, steady, store
from benchmarks.rounds import Loop, interleave, warm_up
from dltrain.config import Config, Run
from dltrain.hooks.records import Records
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import joined

FEATURES, WIDTH, CLASSES, BATCH = 64, 128, 10, 32
"""The model: two hidden layers of ``WIDTH``; the batch: ``BATCH`` samples of ``FEATURES`` bytes."""


@dataclass(frozen=True)
class Size:
    """Steps of a round, and rounds."""

    steps: int
    rounds: int


SIZES = {True: Size(300, 12), False: Size(1000, 40)}
"""By whether it is quick."""

WARM_UP = 20


def run(request: Request) -> dict[str, Any]:
    """Measure and store; returns the line that sums it up."""
    config = Config(run=Run(device=request.device, threads=1))
    size = SIZES[request.quick]
    with joined(config, Environment()) as device:
        plain, clipped = _case(device), _case(device, max_norm=1.0)
        measured = _measure(plain, size), _measure_clipped(clipped, size)
        figures = {**measured[0], **measured[1]}
        path = store(request, device, _settings(plain, size), {"figures": figures})
    first = figures["trainer"]
    return {
        "benchmark": request.name,
        "device": device_kind(device),
        "microseconds_added": first["microseconds_added"]["median"],
        "bare_microseconds": first["bare_microseconds"]["median"],
        "result": path,
    }


def _measure(case: Case, size: Size) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, closing(Records(Path(folder) / "metrics.jsonl")) as records:
        bare, ours, recorded = BareLoop(case), OurLoop(case), OurLoop(case, [records])
        apart = warm_up(ours, bare, WARM_UP, limit=0.1)
        recorded.prepare(WARM_UP)()
        loops: dict[str, Loop] = {"bare": bare, "ours": ours, "recorded": recorded}
        seconds = interleave(loops, size.steps, size.rounds, case.device)
    return {
        "trainer": _figure("trainer", seconds["bare"], seconds["ours"], size.steps, apart),
        "records_hook": _figure("with the records hook", seconds["bare"], seconds["recorded"], size.steps, apart),
    }


def _measure_clipped(case: Case, size: Size) -> dict[str, Any]:
    bare, ours = BareLoop(case), OurLoop(case)
    apart = warm_up(ours, bare, WARM_UP, limit=0.1)
    seconds = interleave({"bare": bare, "ours": ours}, size.steps, size.rounds, case.device)
    return {"clipping": _figure("with clipping in both", seconds["bare"], seconds["ours"], size.steps, apart)}


def _figure(title: str, bare: list[float], ours: list[float], steps: int, apart: float) -> dict[str, Any]:
    """Microseconds per step: what was added in each round, and what the bare loop took."""
    added = spread([(o - b) / steps * 1e6 for o, b in zip(ours, bare, strict=True)])
    step = spread([b / steps * 1e6 for b in bare])
    busy = "" if steady(bare) else "; UNSTEADY: the machine was busy with something else, measure again"
    print(
        f"{title}: {added['median']:.0f} microseconds added to a bare step of {step['median']:.0f} "
        f"(by round {added['min']:.0f} to {added['max']:.0f}, half of them {added['lower_quartile']:.0f} "
        f"to {added['upper_quartile']:.0f}){busy}",
        flush=True,
    )
    return {
        "microseconds_added": added,
        "bare_microseconds": step,
        "steady": steady(bare),
        "weights_apart_after_warm_up": apart,
        "seconds_by_round": {"bare": bare, "ours": ours},
    }


def _case(device: torch.device, max_norm: float = 0.0) -> Case:
    inputs, targets = random_batch((BATCH, FEATURES), CLASSES, device)
    return Case(_mlp, inputs, targets, scaled, device, max_norm=max_norm)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
    )


def _settings(case: Case, size: Size) -> dict[str, Any]:
    config = config_of(case)
    return {
        "model": f"{FEATURES}-{WIDTH}-{WIDTH}-{CLASSES}, ReLU, {sum(p.numel() for p in _mlp().parameters())} weights",
        "batch": BATCH,
        "steps": size.steps,
        "rounds": size.rounds,
        "warm_up_steps": WARM_UP,
        "threads": torch.get_num_threads(),
        "optim": config.optim.model_dump(mode="json"),
        "precision": config.precision.model_dump(mode="json"),
        "logging_every": str(config.logging.every),
        "evaluation": "none",
        "checkpoints": "none",
    }
