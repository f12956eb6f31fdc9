"""What the hook is shown, made up: a run without training, statistics of tensors, counts of their values, a finding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dltrain.config import Config, Data
from dltrain.config.tree import Debugger
from dltrain.debugger.findings import Finding
from dltrain.debugger.histograms import EDGES, counts_of
from dltrain.debugger.moments import moments_of
from dltrain.debugger.seen import Index, Tensors
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.tensorboard.events import Events
from dltrain.tensorboard.hook import TensorBoard

ALONE = Environment.read({})

FINDING = Finding(
    "VanishingGradient",
    40,
    "the gradients of 2 tensors are below 1e-07",
    "Such layers do not learn.",
    "Try a larger learning rate.",
    ("gradient/stem.weight", "gradient/head.weight"),
    {"mean_size": 3e-9},
)


def trainer_of(config: Config, task: Task | None = None, step: int = 0) -> Any:
    """A stand-in for the trainer of one rank, as far as the hook looks at it."""
    mesh = SimpleNamespace(is_sharded=False, tp=1, cp=1, pp=1, environment=ALONE)
    engine = SimpleNamespace(mesh=mesh, device=torch.device("cpu"), named_parameters=lambda: iter(()))
    return SimpleNamespace(config=config, task=task or Task(config), engine=engine, step=step, last_metric=None)


def started(folder: Path, step: int = 0, copy_to: str = "", **debugger: Any) -> TensorBoard:
    """A hook that has begun to write at a step."""
    config = Config(data=Data(), debugger=Debugger(**debugger))
    hook = TensorBoard(Events(folder, copy_to), config, ALONE)
    hook.fit_start(trainer_of(config, step=step))
    return hook


def statistics(step: int, layers: int = 3) -> Tensors:
    """Of a net whose gradients shrink with the steps."""
    generator = torch.Generator().manual_seed(step)
    named: dict[str, torch.Tensor] = {}
    for place in range(layers):
        for name in ("weight", "bias"):
            values = torch.randn(50, generator=generator)
            named[f"blocks.{place}.{name}"] = values
            named[f"gradient/blocks.{place}.{name}"] = values / (step + 10 * place + 1)
            named[f"update/blocks.{place}.{name}"] = values * 1e-3 / (step + 1)
        named[f"blocks.{place}.act_output_0"] = torch.randn(80, generator=generator).relu()
        named[f"active/blocks.{place}.act"] = torch.rand(8, generator=generator)
    return Tensors(Index(list(named)), moments_of(list(named.values())).numpy())


def counted(values: torch.Tensor) -> tuple[Any, Any, Any]:
    """Values in bins, as the debugger counts them; what is not a number is in none."""
    return EDGES, counts_of(values).numpy(), moments_of([values])[0].numpy()


def read(folder: Path) -> EventAccumulator:
    """All that was written."""
    everything = dict.fromkeys(("scalars", "images", "tensors", "histograms"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def values(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Steps and values of a scalar."""
    return [(event.step, event.value) for event in events.Scalars(tag)]


def text(events: EventAccumulator, tag: str) -> str:
    """The last text of that tag."""
    return str(events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode())
