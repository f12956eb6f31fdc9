"""``dltrain verify`` of every engine and schedule, and the page that shows it: docs/parity.md, made from the result.

Each row is a recipe's own model and data, trained for some steps under a layout and on one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.result import RESULTS, Request, device_kind, store
from dltrain.errors import UserError

STEPS = {True: 3, False: 10}
"""By whether it is quick."""

VIT = "image/classify --preset vit-tiny"
SERIES = "timeseries/forecast --preset co2-patchtst"

_LAYOUTS = (
    (2, ""),
    (2, "--parallel.dp_shard 2"),
    (2, "--parallel.dp_shard 2 --parallel.reshard_after_forward false"),
    (4, "--parallel.dp_shard 2 --parallel.dp_replicate 2"),
    (2, "--parallel.tp 2"),
    (2, "--parallel.tp 2 --parallel.sequence true"),
    (2, "--parallel.cp 2"),
    (2, "--parallel.cp 2 --parallel.cp_attention ring"),
    *((2, f"--parallel.pp 2 --parallel.schedule {name}") for name in (
        "gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"
    )),
    *((2, f"--parallel.engine deepspeed --parallel.deepspeed.stage {stage}") for stage in range(4)),
    (8, "--parallel.pp 2 --parallel.dp_shard 2 --parallel.tp 2"),
    (8, "--parallel.pp 2 --parallel.cp 2 --parallel.tp 2"),
    (2, "--parallel.dp_shard 2 --precision.compute bf16"),
    (2, "--parallel.pp 2 --precision.compute bf16"),
    (2, "--precision.compute fp16"),
    (2, "--parallel.dp_shard 2 --precision.reduce bf16 --precision.compute bf16"),
    (2, "--parallel.dp_shard 2 --precision.float8 true"),
)  # fmt: skip

CASES = [(VIT, ranks, words) for ranks, words in _LAYOUTS] + [
    (SERIES, 2, "--parallel.dp_shard 2"),
    (SERIES, 2, "--parallel.pp 2 --parallel.schedule zbv_zero_bubble"),
    (SERIES, 4, "--parallel.dp_shard 2 --parallel.tp 2"),
]

_PAGE = RESULTS.parent.parent / "docs" / "parity.md"

_HEAD = """# Parity

Made by `{command}`; change nothing here. Each row is `dltrain verify` of a recipe for {steps} steps, on {hardware} with
torch {torch}, in fp32 where nothing else is said: largest differences from one process, of losses (absolute), gradient
norms (relative) and the first step's gradients (relative to the largest), and whether losses are within the first
bound, norms and gradients within the second. tests/parallel/matrix.py has the cases that tests go through.

| recipe | ranks | layout | loss | norm | gradient | bounds | the same |
|---|---|---|---|---|---|---|---|
"""


def run(request: Request) -> dict[str, Any]:
    """Verify every case, store the figures and write the page; returns the line that sums it up."""
    steps, rows = STEPS[request.quick], []
    for recipe, ranks, words in CASES:
        rows.append({"recipe": recipe, "ranks": ranks, "layout": words, **_verified(recipe, ranks, words, steps)})
        print(_line(rows[-1]), flush=True)
    cpu = torch.device("cpu")
    path = store(request, cpu, {"steps": steps}, {"cases": rows})
    if not request.quick:
        result = json.loads((RESULTS.parent.parent / path).read_text())
        facts = {"command": request.command, "steps": steps, "hardware": result["hardware"]["cpu"]}
        page = _HEAD.format(**facts, torch=result["versions"]["torch"])
        _PAGE.write_text(page + "".join(_line(row) + "\n" for row in rows))
    same = sum(bool(row["same"]) for row in rows)
    return {"benchmark": request.name, "device": device_kind(cpu), "cases": len(rows), "same": same, "result": path}


def _verified(recipe: str, ranks: int, words: str, steps: int) -> dict[str, Any]:
    command = f"{recipe} --nproc {ranks} --steps {steps} --run.device cpu {words}".split()
    done = subprocess.run([sys.executable, "-m", "dltrain", "verify", *command], capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:  # 1 is also a rank's own failure
        raise UserError(f"dltrain verify {' '.join(command)} failed: {done.stderr.strip()}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _line(row: dict[str, Any]) -> str:
    layout = f"`{row['layout']}`" if row["layout"] else "replicas"
    figures = " | ".join(f"{row[name]:.1e}" for name in ("loss", "norm", "gradient"))
    bounds, same = " ".join(f"{bound:g}" for bound in row["bounds"]), "yes" if row["same"] else "**no**"
    return f"| {row['recipe']} | {row['ranks']} | {layout} | {figures} | {bounds} | {same} |"
