"""The layouts and the model families that parity is shown for: one list, which every test of layouts goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from dltrain.checkpoint.checkpointer import Checkpointer, step_folder
from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.data.order import step_key
from dltrain.hooks.base import NOTHING
from dltrain.mesh import Mesh, build_mesh
from dltrain.models.timeseries import mixer, patchtst
from dltrain.models.vision import convnext, resnet, vit
from dltrain.parallel.apply import parallelize
from dltrain.parallel.engine import Engine
from dltrain.parallel.plan import Plan
from dltrain.readings import Readings
from dltrain.runtime.environment import Environment
from dltrain.runtime.seeds import seed_all
from dltrain.task import Task
from dltrain.verification import stilled

STEPS, HALF = 10, 5
SAMPLES = 10  # of a global batch: ragged on three and on four data ranks
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """So many ranks under so many degrees; ``slow`` ones are left to ``make slow``."""

    ranks: int
    overrides: dict[str, Any]
    slow: bool = False


def layout(ranks: int, slow: bool = False, **settings: Any) -> Layout:
    return Layout(ranks, {f"parallel.{name}": value for name, value in settings.items()}, slow)


def zero(ranks: int, stage: int, slow: bool = False, **settings: Any) -> Layout:
    return layout(ranks, slow, engine="deepspeed", **{"deepspeed.stage": stage}, **settings)


LAYOUTS = {
    "ddp 2": layout(2),
    "ddp 3, ragged": layout(3, slow=True),
    "fsdp 2": layout(2, dp_shard=2),
    "fsdp 3, ragged": layout(3, slow=True, dp_shard=3),
    "zero-2, 2": layout(2, slow=True, dp_shard=2, reshard_after_forward=False),
    "hsdp 2x2": layout(4, slow=True, dp_shard=2, dp_replicate=2),
    "micro-batches": layout(1, micro_batch=3),
    "tp 2": layout(2, tp=2),
    "tp 4": layout(4, slow=True, tp=4),
    "tp 2, micro-batches": layout(2, slow=True, tp=2, micro_batch=4),
    "fsdp 2 x tp 2": layout(4, dp_shard=2, tp=2),
    "fsdp 2 x tp 2, micro-batches": layout(4, slow=True, dp_shard=2, tp=2, micro_batch=2),
    "replicas 2 x tp 2": layout(4, dp_replicate=2, tp=2),
    "hsdp 2x2 x tp 2": layout(8, slow=True, dp_shard=2, dp_replicate=2, tp=2),
    "tp 2, sequence": layout(2, tp=2, sequence=True),
    "fsdp 2 x tp 2, sequence": layout(4, slow=True, dp_shard=2, tp=2, sequence=True),
    "pp 2 x tp 2, sequence, zb-v": layout(4, slow=True, pp=2, tp=2, sequence=True, schedule="zbv_zero_bubble"),
    "cp 2": layout(2, cp=2),
    "cp 2, ring": layout(2, cp=2, cp_attention="ring"),
    "cp 3, ring": layout(3, slow=True, cp=3, cp_attention="ring"),
    "cp 2, ring x tp 2": layout(4, slow=True, cp=2, cp_attention="ring", tp=2),
    "pp 2 x cp 2, ring": layout(4, slow=True, pp=2, cp=2, cp_attention="ring"),
    "cp 2 x fsdp 2": layout(4, slow=True, cp=2, dp_shard=2),
    "cp 2 x ddp 2": layout(4, slow=True, cp=2, dp_replicate=2),
    "cp 2 x tp 2": layout(4, slow=True, cp=2, tp=2),
    "pp 2 x cp 2": layout(4, slow=True, cp=2, pp=2),
    "hsdp 2x1 x cp 2 x tp 2": layout(8, slow=True, cp=2, tp=2, dp_replicate=2),
    "pp 2 x cp 2 x tp 2": layout(8, slow=True, pp=2, cp=2, tp=2),
    "pp 2, gpipe": layout(2, slow=True, pp=2, schedule="gpipe"),
    "pp 2, 1f1b": layout(2, pp=2),
    "pp 4, 1f1b": layout(4, slow=True, pp=4, micro_batch=2),
    "pp 2, looped bfs": layout(2, slow=True, pp=2, schedule="looped_bfs"),
    "pp 2, interleaved 1f1b": layout(2, pp=2, schedule="interleaved_1f1b", micro_batch=3),
    "pp 2, zero bubble": layout(2, slow=True, pp=2, schedule="interleaved_zero_bubble"),
    "pp 2, zb-v": layout(2, pp=2, schedule="zbv_zero_bubble"),
    "pp 2, dualpipe v": layout(2, slow=True, pp=2, schedule="dualpipe_v", micro_batch=2),
    "pp 2 x fsdp 2": layout(4, slow=True, pp=2, dp_shard=2),
    "pp 2 x fsdp 2, zb-v": layout(4, pp=2, dp_shard=2, schedule="zbv_zero_bubble"),
    "pp 2 x replicas 2": layout(4, slow=True, pp=2, dp_replicate=2),
    "pp 2 x tp 2": layout(4, slow=True, pp=2, tp=2),
    "pp 2 x tp 2, zero bubble": layout(4, slow=True, pp=2, tp=2, schedule="interleaved_zero_bubble"),
    "pp 2 x fsdp 2 x tp 2": layout(8, slow=True, pp=2, dp_shard=2, tp=2),
    "pp 2 x fsdp 2 x tp 2, zb-v": layout(8, slow=True, pp=2, dp_shard=2, tp=2, schedule="zbv_zero_bubble"),
    "deepspeed zero-0": zero(2, 0, slow=True, micro_batch=2),
    "deepspeed zero-1": zero(2, 1, slow=True),
    "deepspeed zero-2": zero(2, 2, slow=True),
    "deepspeed zero-2, offload": zero(2, 2, slow=True, micro_batch=2, **{"deepspeed.offload_optimizer": True}),
    "deepspeed zero-3": zero(2, 3),
    "deepspeed zero-3, ragged": zero(3, 3, slow=True, micro_batch=2),
}


class Images(Task):
    """A small ViT with registers."""

    def model(self) -> nn.Module:
        return vit.ViT(8, 4, 3, 5, depth=2, width=32, heads=4, registers=2)

    def plan(self) -> Plan:
        return vit.PLAN

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["y"], reduction="none")


class Series(Task):
    """A small PatchTST over three channels."""

    def model(self) -> nn.Module:
        return patchtst.PatchTST(32, 8, patch=8, stride=4, depth=2, width=32, heads=4, dropout=0.0)

    def plan(self) -> Plan:
        return patchtst.PLAN

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch.fields["y"]).square().mean((1, 2))


class Skipping(nn.Module):
    """Someone's own model: blocks in a list, a weight of its own, a connection from the first block to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(5))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = values = self.stem(images) * self.scale
        for block in self.blocks:
            values = values + block(values)
        values = (values + first).mean((2, 3)) + images.mean((1, 2, 3))[:, None]
        logits: Tensor = self.head(values)
        return logits


class Own(Images):
    """Without a plan."""

    def model(self) -> nn.Module:
        return Skipping()

    def plan(self) -> None:  # type: ignore[override]
        return None


class Idle(nn.Module):
    """Someone's own model, with a layer in the middle that its forward has no use for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(5))
        self.idle = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        values = self.stem(images)
        for block in self.blocks:
            values = values + block(values)
        logits: Tensor = self.head(values.mean((2, 3)))
        return logits


class Wasteful(Own):
    """Without a plan, and a chain."""

    def model(self) -> nn.Module:
        return Idle()


class Straight(Own):
    """Without a plan, and a chain."""

    def model(self) -> nn.Module:
        convolutions = [nn.Sequential(nn.Conv2d(8 if place else 3, 8, 3, padding=1), nn.Tanh()) for place in range(4)]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 64, 5))


class Mixed(Series):
    """A small mixer over three channels."""

    def model(self) -> nn.Module:
        return mixer.Mixer(32, 8, 3, depth=2, width=32, dropout=0.0)

    def plan(self) -> Plan:
        return mixer.PLAN


class Residual(Images):
    """A ResNet whose batch norms keep their running statistics."""

    def model(self) -> nn.Module:
        return stilled(resnet.resnet("resnet18", 5))

    def plan(self) -> Plan:
        return resnet.PLAN


class ConvNet(Images):
    """The smallest ConvNeXt."""

    def model(self) -> nn.Module:
        return convnext.convnext("convnext_tiny", 5, stochastic_depth=0.0)

    def plan(self) -> Plan:
        return convnext.PLAN


class Dropping(Images):
    """With dropout."""

    def model(self) -> nn.Module:
        return vit.ViT(8, 4, 3, 5, depth=2, width=32, heads=4, dropout=0.3)


Fields = Callable[[np.random.Generator], dict[str, np.ndarray[Any, Any]]]


def _images(random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    x = random.normal(size=(SAMPLES, 3, 8, 8)).astype(np.float32)
    return {"x": x, "y": random.integers(0, 5, SAMPLES)}


def _series(random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    values = random.normal(size=(SAMPLES, 40, 3)).astype(np.float32).cumsum(1)
    return {"x": values[:, :32], "y": values[:, 32:]}


def _photos(random: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    x = random.normal(size=(SAMPLES, 3, 32, 32)).astype(np.float32)
    return {"x": x, "y": random.integers(0, 5, SAMPLES)}


FAMILIES: dict[str, tuple[type[Task], Fields]] = {
    "vit": (Images, _images),
    "patchtst": (Series, _series),
    "mixer": (Mixed, _series),
    "resnet": (Residual, _photos),
    "convnext": (ConvNet, _photos),
}
TASKS = {**FAMILIES, "own": (Own, _images), "straight": (Straight, _images), "wasteful": (Wasteful, _images)}
"""With models that bring no plan, which no tensor or context parallelism splits."""

CALM = {"optim.name": "sgd"}
SETTINGS = {"resnet": CALM, "convnext": CALM}
"""Of millions of weights some have gradients of rounding errors alone, which Adam would make steps of full size of."""

WIDE = ("resnet", "convnext")
"""Families whose every layout is slow."""


def fits(family: str, name: str) -> bool:
    """Whether the family's models can be spread so: convolutions are not split, and only transformers share tokens."""
    layout = LAYOUTS[name]
    splits = "parallel.tp" in layout.overrides
    tokens = "parallel.cp" in layout.overrides or "parallel.sequence" in layout.overrides
    if layout.overrides.get("parallel.cp", 1) == 3:
        return family == "vit"  # of six tokens, where a PatchTST has eight
    if family in WIDE:
        return layout.ranks <= 4 and not tokens and not (splits and family == "resnet")
    return family in ("vit", "patchtst") or not tokens


def share_of(family: str, step: int, rank: int, ranks: int) -> Batch:
    """A data rank's share of a step, padded with weight 0 to the size of the largest share."""
    fields = TASKS[family][1](np.random.default_rng(step))
    mine = list(range(rank, SAMPLES, ranks))
    padded = mine + mine[:1] * (-(-SAMPLES // ranks) - len(mine))
    weight = torch.tensor([1.0] * len(mine) + [0.0] * (len(padded) - len(mine)))
    tensors = {name: torch.from_numpy(value[padded]) for name, value in fields.items()}
    return Batch(tensors, weight, tuple(map(str, padded)), torch.tensor(padded))


def build(family: str, rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[Task, Mesh, Engine]:
    config = load_overrides(Config(), {"optim.learning_rate": 0.003, **SETTINGS.get(family, {}), **overrides})
    task = TASKS[family][0](config)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    return task, mesh, parallelize(task, config, mesh, CPU, lambda: share_of(family, 0, 0, 1))


@dataclass(frozen=True)
class Trained:
    """What a run gave: of every step the loss and the norm; weights at the end; losses of samples held out.

    Of a pipeline, ranks have the weights of their part, and those of the last stage what was evaluated.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    evaluated: list[float]


def train(
    rank: int, ranks: int, family: str, overrides: dict[str, Any], load: str = "", save: str = "", stop: int = STEPS
) -> Trained:
    """Steps up to ``stop``, clipped, and the losses of one more batch without training.

    From the checkpoint in the folder ``load``, if one is named, and with one in ``save`` at the end.
    """
    task, mesh, engine = build(family, rank, ranks, overrides)
    start = 0
    if load:
        checkpoints = Checkpointer(Path(load), 3, mesh.environment)
        start = checkpoints.load(step_folder(Path(load), HALF), engine)["step"]
    readings, losses, norms = Readings(CPU, engine.counts), [], []
    for step in range(start, stop):
        batch = share_of(family, step, mesh.data_rank, mesh.data_ranks)
        count = readings.reduce(torch.dot(task.count(batch), batch.weight), NOTHING)
        loss = engine.forward_backward(batch, count)
        norm = engine.step(0.003, 1.0)
        readings.push(step, (0, 0), 0.003, loss.sum, norm)
        losses += [reading.loss for reading in readings.flush()]
        norms.append(norm.item())
    if save:
        Checkpointer(Path(save), 3, mesh.environment).save(stop, engine, {"step": stop})
    evaluated = engine.evaluate(share_of(family, STEPS, 0, 1))[1].tolist()
    return Trained(losses, norms, whole(engine), evaluated)


def replicated(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """A ViT trained with dropout under the trainer's seeds: the data rank, and the weights that are whole here."""
    config = load_overrides(Config(), overrides)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(Dropping(config), config, mesh, CPU, lambda: share_of("vit", 0, 0, 1))
    for step in range(3):
        seed_all(step_key(0, step, mesh.data_rank), CPU)
        engine.forward_backward(share_of("vit", step, mesh.data_rank, mesh.data_ranks), torch.tensor(10.0))
        engine.step(0.01, 1.0)
    plain = {name: value for name, value in engine.named_parameters() if not isinstance(value, DTensor)}
    return mesh.data_rank, {name: value.detach().clone() for name, value in plain.items()}


def whole(engine: Engine) -> dict[str, Tensor]:
    """The model's weights by name, each in one piece."""
    state = engine.state_dict()["model"]
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in full.items()}
