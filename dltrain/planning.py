"""Which layouts a recipe could run under, and what each would take: what ``dltrain plan`` shows.

The recipe's own model is built on the meta device, so it takes no memory whatever its size; a few training samples are
read for their shapes. No GPU and no other rank is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dltrain import storage
from dltrain.config import Config
from dltrain.config.tree import AUTO
from dltrain.data.batch import Batch
from dltrain.data.building.progress import size_text
from dltrain.errors import UserError
from dltrain.job_data import Place, open_data, train_loader
from dltrain.mesh import Mesh
from dltrain.parallel.devices import device_of
from dltrain.parallel.estimate import Cluster, Estimate, Study
from dltrain.parallel.rehearsal import META, SIZES
from dltrain.recipes import Declarations
from dltrain.runtime.environment import Environment
from dltrain.task import Task

_HEADINGS = (
    "layout",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "peak",
    "sent",
    "bubble",
    "step",
    "samples/s",
)
_SHOWN = ("dp_replicate", "dp_shard", "cp", "tp", "pp")


def plan(task: type[Task], recipe: Declarations, words: Sequence[str], overrides: dict[str, Any]) -> int:
    """What a recipe file answers to ``plan DEVICE --world N --memory BYTES --node-ranks N --top N [--preset NAME]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    for name in ("--world", "--memory", "--node-ranks", "--top"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--preset", default="")
    known = parser.parse_args(words)
    cluster = Cluster(known.world, known.node_ranks, known.memory, device_of(known.device))
    given = {name.removeprefix("parallel.") for name in overrides if name.startswith("parallel.")}
    show_plan(task, recipe.configure(known.preset, overrides), cluster, known.top, given)
    return 0


def show_plan(task: type[Task], config: Config, cluster: Cluster, top: int, given: Collection[str]) -> None:
    """Print the ``top`` layouts, the quickest first: a table for people, and in the last line a JSON object.

    Settings of ``parallel`` whose names are ``given`` are not to change.
    """
    _refuse(config)
    storage.configure(config.storage)
    mine = task(config)
    batch = _samples(mine, config)
    study = Study(mine, config, _on_meta(mine), batch, _tell)
    found = study.ranked(cluster, given)
    _show(found[:top], cluster)
    fitting = sum(each.fits for each in found)
    size = size_text(cluster.memory)
    print(f"{fitting} of {len(found)} layouts fit in {size} a rank; times are estimates, for ranking")
    if not fitting and config.parallel.activation_checkpointing == "none":
        print("with --parallel.activation_checkpointing full, or selective, activations take less")
    print(json.dumps(_as_json(found[:top], len(found), fitting, cluster)), flush=True)


def _refuse(config: Config) -> None:
    """What cannot be told without the GPU, its compiler, or DeepSpeed."""
    parallel = config.parallel
    if parallel.engine != "plain":
        raise UserError(f"dltrain plan knows parallel.engine plain alone, and it is {parallel.engine}")
    if parallel.micro_batch == AUTO:
        raise UserError("parallel.micro_batch is auto, which the ranks measure; give dltrain plan a number, or 0")
    if parallel.offload:
        raise UserError("parallel.offload moves bytes to the host that dltrain plan does not follow; plan without it")
    if parallel.activation_checkpointing == "budget":
        raise UserError(
            "parallel.activation_checkpointing is budget, which the compiler alone can weigh; take full or selective"
        )


def _tell(what: str) -> None:
    """A line that the next one takes the place of, for who waits at a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what} ... ", end="", file=sys.stderr, flush=True)


def _samples(task: Task, config: Config) -> Batch:
    """A few training samples, by which the task also learns its data's facts."""
    alone, host = Environment(), torch.device("cpu")
    few = config.replace(data=config.data.replace(global_batch_size=SIZES[0], evaluation="", workers=0, decode="host"))
    mesh = Mesh(1, 1, 1, 1, 1, alone, None, None)
    loader = train_loader(open_data(few, task, alone), Place(few, task, alone, mesh, host), Path())
    return loader.peek().to(torch.device("cpu"))


def _on_meta(task: Task) -> nn.Module:
    try:
        with META:
            model = task.model()
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{type(task).__name__}.model() cannot be built on the meta device, where tensors have no values "
            f"({reason}); build it without looking at values or loading weights"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() returned {type(model).__name__}, not a torch.nn.Module")
    return model.to(META)  # what was made from values of its own


def layout_text(estimate: Estimate) -> str:
    """The settings of a layout that are not 1 or off, short."""
    parallel = estimate.parallel
    parts = [f"{name} {getattr(parallel, name)}" for name in _SHOWN if getattr(parallel, name) > 1]
    parts += [parallel.schedule] if parallel.pp > 1 else []
    parts += ["sequence"] if parallel.sequence else []
    parts += ["kept after forward"] if not parallel.reshard_after_forward and parallel.dp_shard > 1 else []
    return ", ".join(parts) or "one rank"


def _row(estimate: Estimate) -> tuple[str, ...]:
    memory = estimate.memory
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak)
    return (
        layout_text(estimate),
        *(size_text(int(part)) for part in parts[:-1]),
        size_text(int(memory.peak)) + ("" if estimate.fits else " too much"),
        size_text(int(sum(estimate.sent.values()))),
        f"{estimate.bubble:.0%}",
        f"{estimate.seconds * 1e3:,.2f} ms",
        f"{estimate.samples_per_second:,.0f}",
    )


def _show(estimates: Sequence[Estimate], cluster: Cluster) -> None:
    from rich.console import Console  # slow to import
    from rich.table import Table

    title = f"{cluster.world} ranks of {cluster.device.name}, {cluster.node_ranks} on a node: bytes of a rank"
    table = Table(*_HEADINGS, title=title)
    for estimate in estimates:
        table.add_row(*_row(estimate), style="" if estimate.fits else "dim")
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def _as_json(estimates: Sequence[Estimate], layouts: int, fitting: int, cluster: Cluster) -> dict[str, Any]:
    return {
        "world": cluster.world,
        "device": cluster.device.name,
        "memory": cluster.memory,
        "layouts": layouts,
        "fitting": fitting,
        "top": [
            {
                "parallel": {
                    name: getattr(each.parallel, name)
                    for name in (*_SHOWN, "schedule", "sequence", "reshard_after_forward", "micro_batch")
                },
                "fits": each.fits,
                "memory": asdict(each.memory),
                "sent": each.sent,
                "bubble": each.bubble,
                "seconds": each.seconds,
                "samples_per_second": each.samples_per_second,
            }
            for each in estimates
        ],
    }
