"""What statistics cost beside smdebug, SageMaker Debugger's hook, at the end of a step that is due.

The same layers are trained by either library with its hook and without, in turn: CPU seconds of the whole process, on
one thread. Of 50 parameters and their gradients smdebug is asked for two numbers each, 200 in all, and then for every
one of the 14 that it shares with ours; dltrain takes all of its statistics each time, and judges them by its default
rules.

smdebug 1.0.34 needs older versions of numpy and protobuf than ours, so it has an environment of its own
(tests/debugger/smdebug_output/README.md), whose interpreter ``--peer-python`` or ``DLTRAIN_SMDEBUG_PYTHON`` names.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.case import Case, random_batch, scaled
from benchmarks.ours import OurLoop, config_of
from benchmarks.result import Request, device_kind, spread, steady, store
from dltrain.config import Config, Debugger, Length, Run
from dltrain.debugger.hook import Debug
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import joined

VARIABLE = "DLTRAIN_SMDEBUG_PYTHON"
SCRIPT = Path(__file__).with_name("smdebug_peer.py")

LAYERS, BATCH = 25, 32
OF_OURS = 8
"""Times the steps of a round of theirs, which lasts as long then; and the beginning of a run is no part of a step."""

TARGET = 20.0
"""Times that smdebug's same 200 numbers should cost more."""

TWO = {"reductions": ["max"], "abs_reductions": ["mean"]}
ALL = {name: ["min", "max", "mean", "std", "variance", "sum"] for name in ("reductions", "abs_reductions")}
ALL |= {"norms": ["l1", "l2"]}

DEBUGGER = Debugger(every=Length.parse("1st"), collect=("weights", "gradients"))


@dataclass(frozen=True)
class Comparison:
    """What smdebug is asked for, of layers of so many features."""

    width: int
    reductions: dict[str, list[str]]

    @property
    def numbers(self) -> int:
        """That smdebug writes at each step."""
        return 4 * LAYERS * sum(map(len, self.reductions.values()))


COMPARISONS = {
    f"{4 * LAYERS * each} numbers, layers of {width}": Comparison(width, asked)
    for each, asked in ((2, TWO), (14, ALL))
    for width in (64, 256)
}
"""The target is that of the first; the larger the layers, the more of either's time is arithmetic."""


@dataclass(frozen=True)
class Rounds:
    """How much is measured: passes alternate between the libraries, rounds of so many steps between hook and none."""

    passes: int
    rounds: int
    steps: int


def run(request: Request) -> dict[str, Any]:
    """Measure and store; returns the line that sums it up."""
    python = _python(request)
    rounds = Rounds(2, 3, 3) if request.quick else Rounds(5, 5, 5)
    torch.set_num_threads(1)
    with joined(Config(run=Run(device=request.device, threads=1)), Environment()) as device:
        if device.type != "cpu":
            raise UserError("benchmark smdebug adds up CPU seconds; on a GPU give --device cpu")
        found = {name: _compared(name, each, rounds, python, device) for name, each in COMPARISONS.items()}
        versions = {name: figures.pop("versions") for name, figures in found.items()}
        settings = {**_settings(rounds), "peer": versions[next(iter(versions))]}
        path = store(request, device, settings, {"figures": found})
    first = found[next(iter(found))]
    return {
        "benchmark": request.name,
        "device": device_kind(device),
        **{key: first[key]["median"] for key in ("dltrain_ms", "smdebug_ms")},
        "ratio": {name: figures["ratio"]["median"] for name, figures in found.items()},
        "target": TARGET,
        "met": first["ratio"]["median"] >= TARGET,
        "result": path,
    }


def _python(request: Request) -> str:
    name = request.peer_python or os.environ.get(VARIABLE, "")
    found = shutil.which(name) if name else None
    if found is None:
        raise UserError(
            f"there is no interpreter {name!r} with smdebug; give --peer-python or {VARIABLE} the python of an "
            "environment made as tests/debugger/smdebug_output/README.md says"
        )
    return found


def _compared(name: str, asked: Comparison, rounds: Rounds, python: str, device: torch.device) -> dict[str, Any]:
    """CPU milliseconds that a due step takes more, by pass; their ratio is that of the same pass."""
    theirs: list[float] = []
    ours: list[float] = []
    bare: list[float] = []
    versions: dict[str, str] = {}
    for _ in range(rounds.passes):
        peer = _peer(asked, rounds, python)
        versions = peer["versions"]
        theirs.append(_added(peer["bare"], peer["hooked"], rounds.steps))
        mine = _ours(asked, rounds, device)
        ours.append(_added(mine["bare"], mine["hooked"], OF_OURS * rounds.steps))
        bare += [1e3 * each / rounds.steps for each in peer["bare"]]
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    print(f"{name}: dltrain {median(ours):.2f} ms, smdebug {median(theirs):.1f} ms, {median(ratios):.1f} times as much",
          flush=True)  # fmt: skip
    return {
        "dltrain_ms": spread(ours),
        "smdebug_ms": spread(theirs),
        "ratio": spread(ratios),
        "plain_step_ms": spread(bare),
        "numbers_of_smdebug": asked.numbers,
        "steady": steady(ours) and steady(theirs),
        "by_pass": {"dltrain_ms": ours, "smdebug_ms": theirs},
        "versions": versions,
    }


def _added(bare: Sequence[float], hooked: Sequence[float], steps: int) -> float:
    """Milliseconds per step: the median of the differences of neighbouring rounds."""
    return 1e3 * median(b - a for a, b in zip(bare, hooked, strict=True)) / steps


def _peer(asked: Comparison, rounds: Rounds, python: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = {
            **{"layers": LAYERS, "width": asked.width, "batch": BATCH, "reductions": asked.reductions},
            **{"steps": rounds.steps, "rounds": rounds.rounds, "folder": str(Path(folder) / "trial")},
        }
        command = [python, "-I", str(SCRIPT), json.dumps(words)]  # isolated, for this module bears their name
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"smdebug does not run there: {last}; make its environment anew")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _ours(asked: Comparison, rounds: Rounds, device: torch.device) -> dict[str, list[float]]:
    """CPU seconds by round."""
    case = _case(asked.width, device)
    config = config_of(case).replace(debugger=DEBUGGER)
    found: dict[str, list[float]] = {"bare": [], "hooked": []}
    with tempfile.TemporaryDirectory() as folder, closing(Debug(config, Environment(), Path(folder))) as hook:
        loops = {"bare": OurLoop(case), "hooked": OurLoop(case, [hook])}
        for loop in loops.values():
            loop.prepare(5)()
        for _ in range(rounds.rounds):
            for name, loop in loops.items():
                found[name].append(_seconds(loop, OF_OURS * rounds.steps))
    return found


def _seconds(loop: OurLoop, steps: int) -> float:
    training = loop.prepare(steps)
    gc.collect()
    started = time.process_time()
    training()
    return time.process_time() - started


def _case(width: int, device: torch.device) -> Case:
    inputs, targets = random_batch((BATCH, width), width, device)

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))

    return Case(build, inputs, targets, scaled, device)


def _settings(rounds: Rounds) -> dict[str, Any]:
    return {
        "model": f"{LAYERS} linear layers, batch {BATCH}",
        "threads": 1,
        **{"passes": rounds.passes, "rounds": rounds.rounds, "steps": rounds.steps},
        "debugger": DEBUGGER.model_dump(mode="json"),
        "target": TARGET,
    }
