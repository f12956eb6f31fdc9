"""CPU seconds of a step under each layout, beside the same layout written by hand in plain PyTorch.

Each layout runs in processes joined by gloo, one thread each, that hold both loops and train them in turn: so many
steps of one, then of the other, every second round the other way round. What is compared is CPU time of all ranks
together, which a busy machine changes less than the clock. ViT, clipping in both loops, AdamW, no data read.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.bare_parallel import LAYOUTS, MICRO_BATCHES, BareParallelLoop
from benchmarks.case import Case, random_batch, scaled
from benchmarks.ours import OurLoop, config_of
from benchmarks.result import Request, device_kind, spread, steady, store
from benchmarks.rounds import Loop
from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.models.vision import vit
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks

BATCH, PIXELS, CLASSES = 16, 32, 10
CPU = torch.device("cpu")
SETTINGS = {
    "ddp 2": Parallel(),
    "fsdp 2": Parallel(dp_shard=2),
    "tp 2": Parallel(tp=2),
    "pp 2": Parallel(pp=2, micro_batch=BATCH // MICRO_BATCHES),
    "fsdp 2 x tp 2": Parallel(dp_shard=2, tp=2),
}
WARM_UP = 6


@dataclass(frozen=True)
class Size:
    """Steps of a round, and rounds."""

    steps: int
    rounds: int


SIZES = {True: Size(4, 10), False: Size(10, 24)}
"""By whether it is quick."""


def run(request: Request) -> dict[str, Any]:
    """Measure and store; returns the line that sums it up."""
    if request.device == "cuda":
        raise UserError("the benchmark 'parallel' measures CPU time; take --device cpu")
    size, figures = SIZES[request.quick], {}
    for layout in LAYOUTS:
        ranks = 4 if "x" in layout else 2
        rounds = run_ranks(measure, ranks, ranks, layout, size, seconds=1200.0)
        figures[layout] = _figure(layout, rounds, size)
    settings: dict[str, Any] = {
        "model": "ViT of 4 blocks, width 128, 64 tokens",
        "batch": BATCH,
        "threads": 1,
        **vars(size),
    }
    settings["optim"] = config_of(case()).optim.model_dump(mode="json")
    path = store(request, CPU, settings, {"figures": figures})
    overhead = {layout: round(figure["ratio"]["median"] - 1, 4) for layout, figure in figures.items()}
    return {"benchmark": request.name, "device": device_kind(CPU), "overhead": overhead, "result": path}


def measure(rank: int, ranks: int, layout: str, size: Size) -> dict[str, list[float]]:
    """CPU seconds of this rank, by loop and round."""
    torch.set_num_threads(1)
    environment = Environment(rank, ranks, rank, ranks)
    ours = OurLoop(case(), parallel=SETTINGS[layout], plan=vit.PLAN, environment=environment)
    loops: dict[str, Loop] = {"bare": BareParallelLoop(case(), layout), "ours": ours}
    for loop in loops.values():
        loop.prepare(WARM_UP)()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(size.rounds):
        for name in list(loops) if number % 2 == 0 else reversed(list(loops)):
            body = loops[name].prepare(size.steps)
            gc.collect()
            dist.barrier()
            started = time.process_time()
            body()
            dist.barrier()
            seconds[name].append(time.process_time() - started)
    return seconds


def case() -> Case:
    """The model and the batch, the same on every rank."""
    inputs, targets = random_batch((BATCH, 3, PIXELS, PIXELS), CLASSES, CPU)
    return Case(_model, inputs, targets, scaled, CPU, max_norm=1.0)


def _model() -> nn.Module:
    return vit.ViT(PIXELS, 4, 3, CLASSES, depth=4, width=128, heads=4)


def _figure(layout: str, ranks: list[dict[str, list[float]]], size: Size) -> dict[str, Any]:
    """Both loops' CPU seconds per step, of all ranks, and how many times the bare loop's ours are."""
    by_rank = {name: [rounds[name] for rounds in ranks] for name in ("bare", "ours")}
    together = {name: [sum(parts) for parts in zip(*rounds, strict=True)] for name, rounds in by_rank.items()}
    ratio = spread([o / b for o, b in zip(together["ours"], together["bare"], strict=True)])
    bare = statistics.median(together["bare"]) / size.steps
    busy = "" if steady(together["bare"]) else "; UNSTEADY: measure again"
    print(
        f"{layout}: {ratio['median'] - 1:+.1%} CPU time of {bare * 1e3:.0f} ms a step by hand "
        f"(half of the rounds {ratio['lower_quartile'] - 1:+.1%} to {ratio['upper_quartile'] - 1:+.1%}){busy}",
        flush=True,
    )
    return {
        "ratio": ratio,
        "bare_cpu_seconds": spread([seconds / size.steps for seconds in together["bare"]]),
        "steady": steady(together["bare"]),
        "cpu_seconds_by_round": together,
    }
