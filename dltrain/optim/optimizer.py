"""AdamW and SGD, fused where torch can, with groups by whether a parameter decays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from dltrain.config import Optim
from dltrain.errors import UserError


def build_optimizer(model: nn.Module, config: Optim, names: Sequence[str] | None = None) -> Optimizer:
    """An optimizer over the trained parameters of ``model``; ``names`` are those of the whole, where it is a part.

    Parameters of fewer than two dimensions (biases, scales of norms) and those that match ``config.no_decay`` are left
    without decay. The fused form is what lets a step with a non-finite gradient be skipped on the device.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [name for name, _ in named] if names is None else names
    if not names:
        raise UserError("the model has no parameter to train: all are frozen")
    _check_patterns(config.no_decay, names)
    groups = [
        {"params": [p for n, p in named if _decays(n, p, config)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not _decays(n, p, config)], "weight_decay": 0.0},
    ]
    # a stage of a pipeline may have nothing to train, and torch refuses no groups, not empty ones
    groups = [part for group in groups for part in _by_mesh(group)] or groups
    fused = _is_fused(config, [parameter for _, parameter in named])
    kernels = {"fused": fused, "foreach": not fused}
    if config.name == "adamw":
        return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, **kernels)
    optimizer = SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov, **kernels)
    if config.momentum:  # torch's fused kernel leaves a buffer unfilled when the first step is skipped
        for _, parameter in named:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _is_fused(config: Optim, parameters: Sequence[nn.Parameter]) -> bool:
    """torch has no fused SGD for sharded tensors."""
    possible = config.name != "sgd" or not any(isinstance(parameter, DTensor) for parameter in parameters)
    if config.implementation == "fused" and not possible:
        raise UserError(
            "optim.implementation is fused, and torch has no fused SGD for sharded or split layers; take auto, or adamw"
        )
    return possible and config.implementation != "foreach"


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether :func:`skip_if_nonfinite` works: for fused optimizers."""
    return bool(optimizer.defaults.get("fused"))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def skip_if_nonfinite(optimizer: Optimizer, nonfinite: torch.Tensor) -> None:
    """Make the next step leave everything as it is where ``nonfinite`` (float scalar on the device) is 1.

    Fused optimizers read this attribute, which torch's gradient scaler sets too; the host never looks.
    """
    optimizer.__dict__["found_inf"] = nonfinite


def _by_mesh(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The group's parameters, apart where they are split over other ranks: a fused kernel takes one kind at a time."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        kinds.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return ({**group, "params": parameters} for parameters in kinds.values())


def _decays(name: str, parameter: Any, config: Optim) -> bool:
    return parameter.dim() >= 2 and not any(fnmatch(name, pattern) for pattern in config.no_decay)


def _check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(f"optim.no_decay has {pattern!r}, which matches no parameter, such as {names[0]!r}")
