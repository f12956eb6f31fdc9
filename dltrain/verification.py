"""Whether a layout changes what is learnt: a recipe's own model and data, step by step, under two layouts.

Each layout's ranks train for some steps by the same loop as ever and write down losses, gradient norms and the first
step's gradients by parameter. What is random by design is switched off: dropout and stochastic depth are 0, batch norm
keeps its running statistics, the learning rate is constant.

    record_steps(Classify, config, environment, folder, steps=10)  # on every rank, under each layout
    difference = compare(read(first), read(second))
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dltrain import storage
from dltrain.checkpoint.weights import starting_weights
from dltrain.config import Config, Length, Schedule
from dltrain.hooks.base import Hook, View
from dltrain.job_data import Place, open_data, train_loader
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.checks import check_layout
from dltrain.parallel.gradients import whole
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import joined
from dltrain.task import Task
from dltrain.trainer import Trainer

_FILE = "recorded-{}.pt"
"""Of each part of a pipeline."""

# a gradient that is split and sharded is gathered in two steps here, once; torch warns of it on every rank
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


class Bounds(NamedTuple):
    """Of losses, absolute; and of norms and gradients, which are relative."""

    loss: float
    gradient: float


@dataclass(frozen=True)
class Recorded:
    """Of every step the loss and the gradient norm; of the first step the gradients, of the last the weights and
    buffers, whole, by name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The largest differences: of losses; of norms, relative; of gradients, in units of the largest gradient; and of
    weights, for show: AdamW makes steps of rounding where a gradient should be zero.

    ``parameter`` is the first, in the order of the model, whose gradient departs furthest; ``by_parameter`` has all.
    """

    loss: float
    norm: float
    gradient: float
    parameter: str
    weight: float
    by_parameter: dict[str, float]

    def within(self, bounds: Bounds) -> bool:
        """Whether losses are, and norms and gradients."""
        return self.loss <= bounds.loss and max(self.norm, self.gradient) <= bounds.gradient

    def first(self, bounds: Bounds) -> str:
        """The first parameter, in the order of the model, whose gradient is not within; empty where all are."""
        return next((name for name, apart in self.by_parameter.items() if not apart <= bounds.gradient), "")


def record_steps(task: type[Task], config: Config, environment: Environment, folder: Path, steps: int) -> None:
    """Train ``steps`` steps and leave what was seen in ``folder``; collective."""
    config = config.replace(
        run=config.run.replace(length=Length.parse(f"{steps}st")),
        logging=config.logging.replace(every=Length.parse("1st")),
        schedule=Schedule(name="constant"),
    )
    check_layout(config, environment)
    storage.configure(config.storage)
    with joined(config, environment) as device:
        still = _without_chance(task)(config)
        mesh = build_mesh(config.parallel, environment, device)
        data = open_data(config.replace(data=config.data.replace(evaluation="")), still, environment)
        loader = train_loader(data, Place(config, still, environment, mesh, device), folder / "quarantine")
        engine = parallelize(still, config, mesh, device, loader.peek, starting_weights(config, environment))
        seen = _Recorder()
        Trainer(config, still, engine, loader, hooks=[seen], random_stream=mesh.random_stream).fit()
        weights = {name: whole(value).cpu() for name, value in engine.state_dict()["model"].items()}
        if mesh.first_of_part:
            parts = {"losses": seen.losses, "norms": seen.norms, "gradients": seen.gradients, "weights": weights}
            torch.save(parts, folder / _FILE.format(mesh.pp_rank))


def read(folder: Path) -> Recorded:
    """What :func:`record_steps` left in ``folder``."""
    parts = [torch.load(file, weights_only=True) for file in sorted(folder.glob(_FILE.format("*")))]
    gradients, weights = (
        {name: value for part in parts for name, value in part[kind].items()} for kind in ("gradients", "weights")
    )
    return Recorded(parts[0]["losses"], parts[0]["norms"], gradients, weights)


def compare(reference: Recorded, found: Recorded) -> Difference:
    """How far two records of the same recipe are apart."""
    largest = max(float(gradient.abs().max()) for gradient in reference.gradients.values()) or 1.0
    apart = {
        name: float((found.gradients[name] - gradient).abs().max()) / largest if name in found.gradients else math.inf
        for name, gradient in reference.gradients.items()
    }
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    weights = [_apart(weight, found.weights.get(name)) for name, weight in reference.weights.items()]
    pairs = list(zip(reference.norms, found.norms, strict=True))
    return Difference(
        loss=_largest([abs(a - b) for a, b in zip(reference.losses, found.losses, strict=True)]),
        norm=_largest([abs(a - b) / max(abs(a), 1e-12) for a, b in pairs]),
        gradient=apart[worst],
        parameter=worst,
        weight=_largest(weights or [0.0]),
        by_parameter=apart,
    )


def _apart(one: Tensor, other: Tensor | None) -> float:
    return math.inf if other is None else float((one.double() - other.double()).abs().max())


def _largest(values: list[float]) -> float:
    """The largest value; not a number where one of them is none."""
    return math.nan if any(map(math.isnan, values)) else max(values)


class _Recorder(Hook):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def gradients_ready(self, trainer: View) -> None:
        if trainer.step:
            return
        for name, gradient in trainer.engine.gradients():
            self.gradients[name] = gradient.detach().cpu().clone()

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])
        self.norms.append(record["grad_norm"])


def _without_chance(task: type[Task]) -> type[Task]:
    """The same task, whose model does the same in every forward pass."""

    class Still(task):  # type: ignore[valid-type, misc]
        def model(self) -> nn.Module:
            model = super().model()
            return stilled(model) if isinstance(model, nn.Module) else model

    Still.__name__ = task.__name__
    return Still


def stilled(model: nn.Module) -> nn.Module:
    """The model, changed in place to do the same in every forward pass, and for every sample by itself."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            setattr(module, "p", 0.0)  # noqa: B010  of several types
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0  # they keep it as a number
        if isinstance(module, _BatchNorm):
            module.eval()
            setattr(module, "train", MethodType(_stay, module))  # noqa: B010  a method of this one alone
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of ``train``: the module stays in the mode it has."""
    return module
