"""Runs on disk as a training would leave them, without one: for what reads runs.

run = recorded(tmp_path, blocks=30, steps=20, ranks=4)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.config import Config
from dltrain.debugger.findings import Finding
from dltrain.debugger.histograms import BINS
from dltrain.debugger.recorder import Guard, Recorder
from dltrain.debugger.seen import Index, Tensors
from dltrain.runtime.environment import Environment
from dltrain.runtime.step_clock import PARTS

EVERY = 5
"""Steps between due ones."""

_OF_A_BLOCK = ("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight", "norm.weight")


def parameters(blocks: int) -> list[str]:
    """Names of a transformer's parameters, such as ``layers.3.mlp.up.weight``."""
    inner = [f"layers.{block}.{name}" for block in range(blocks) for name in _OF_A_BLOCK]
    return ["embed.weight", *inner, "head.weight"]


def finding(step: int, rule: str = "VanishingGradient", where: tuple[str, ...] = ()) -> Finding:
    """Of a rule that is known, or of any other."""
    return Finding(rule, step, f"something <b>odd</b> at {step}", "It matters.", "Try [less].", where, {})


def recorded(
    folder: Path, blocks: int = 2, steps: int = 20, ranks: int = 1, gpus: int = 0, findings: tuple[Finding, ...] = ()
) -> Path:
    """A run with every kind of record; its gradients get smaller from the last layer to the first."""
    names = parameters(blocks)
    kinds = {"": 0.05, "gradient/": 1e-3, "update/": 5e-5}
    tensors = [prefix + name for prefix in kinds for name in names]
    tensors += [f"layers.{block}.act_output_0" for block in range(blocks)]
    tensors += [f"active/layers.{block}.act" for block in range(blocks)]
    recorder = Recorder(folder / "debugger", Guard(Environment(), strict=True), 0, tensors, histograms=True)
    index, random, metrics = Index(tensors), np.random.default_rng(0), []
    for step in range(1, steps + 1):
        loss = 0.2 + 3 * 0.97**step
        recorder.scalars(step, (1000.0 + step, loss, 2 * loss, 1e-3, 0.0, min(1.0, 1 / loss)))
        if step == 1 or step % EVERY == 0:
            recorder.statistics(step, Tensors(index, _rows(tensors, kinds, step, random), _counts(names, random)))
            recorder.observed(step, "timeline", _timeline(step, ranks, random))
            recorder.observed(step, "system", _samples(step, gpus, random))
        if step % 10 == 0:
            metrics.append({"kind": "evaluation", "time": 1000.0 + step, "step": step, "evaluation/loss": loss + 0.1})
            metrics[-1] |= {"evaluation/accuracy": 1 - loss / 4, "evaluation/samples": 100.0}
            recorder.observed(step, "confusion", {"matrix": [[40, 8], [1, 51]], "names": ["cat", "dog"]}, True)
            recorder.observed(step, "losses", {f"s{each}": 5.0 if each < 3 else 0.9**step for each in range(50)}, True)
    metrics.append({"kind": "step", "step": steps, "loss": 0.2, "samples_per_second": 3456.0, "mfu": 0.4123})
    for each in findings:
        recorder.finding(replace(each))
    recorder.close()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "run.json").write_text(json.dumps(record(steps, ranks)))
    return folder


def record(steps: int, ranks: int) -> dict[str, Any]:
    """A ``run.json``."""
    config = Config().model_dump(mode="json")
    config["optim"]["learning_rate"] = 0.123
    scores = {"loss": 0.3, "accuracy": 0.9}
    facts = {"recipe": "own.py", "preset": "small", "status": "finished", "created": 1000.0, "config": config}
    facts |= {"world_size": ranks, "seconds": 12.0, "samples_per_second": 3456.0, "scores": scores, "step": steps}
    return facts


def _rows(tensors: list[str], kinds: dict[str, float], step: int, random: np.random.Generator) -> Any:
    rows = np.zeros((len(tensors), 9))
    for row, name in zip(rows, tensors, strict=True):
        size = next((size for prefix, size in kinds.items() if prefix and name.startswith(prefix)), kinds[""])
        size *= 10 ** (-(0 if "head" in name else 1) + 0.1 * random.standard_normal())
        count = 100.0
        zeros = min(count, 3.0 * step) if name.startswith("active/layers.0.") else 0.0
        row[:] = (count, 0.1 * size * count, size**2 * count, 0.8 * size * count, zeros, 0, 3 * size, 3 * size, 0)
    return rows


def _counts(names: list[str], random: np.random.Generator) -> dict[str, Any]:
    found = {}
    for name in names[:3]:
        found[name] = np.zeros(BINS)
        found[name][BINS // 2 - 30 : BINS // 2 + 30] = random.integers(1, 100, 60)
    return found


def _timeline(step: int, ranks: int, random: np.random.Generator) -> dict[str, Any]:
    seconds = {part: [0.0] * ranks for part in PARTS}
    for part, usual in (("data_wait", 0.001), ("forward", 0.01), ("backward", 0.02), ("optimizer", 0.002)):
        seconds[part] = (usual * random.uniform(0.9, 1.1, ranks)).tolist()
    if ranks > 1:
        seconds["forward"][-1] = 0.03
        seconds["communication"] = [0.02] * (ranks - 1) + [0.001]
    return {"of": step, "seconds": seconds}


def _samples(step: int, gpus: int, random: np.random.Generator) -> list[dict[str, Any]]:
    rates = dict.fromkeys(("read", "written", "sent", "received"), 2_000_000)
    busy = {"cpu": 60.0, "core": 90.0, "io_wait": 1.0, "memory": 30.0, "resident": 10**9, "workers": 4, "cores": 4}
    used = [{"used": float(random.uniform(80, 99)), "memory": 50.0 + gpu} for gpu in range(gpus)]
    return [{"time": 1000.0 + step + place, **busy, **rates, "gpus": used} for place in range(3)]
