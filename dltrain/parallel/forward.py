"""From a batch to losses by sample, whatever runs the model in between."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dltrain.config import Precision
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.task import Task

LEAST_COUNT = 1e-20
"""A step whose samples all weigh 0 has no gradient, rather than one that is not a number."""

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats of ``precision.compute`` that weights, in fp32, are cast to."""


def inputs_of(task: Task, batch: Batch, precision: Precision) -> tuple[Any, ...]:
    """The model's arguments, images channels last where that is asked for. Raises :class:`UserError` for no tuple."""
    inputs = task.inputs(batch)
    if not isinstance(inputs, tuple):
        raise UserError(
            f"{type(task).__name__}.inputs() returned {type(inputs).__name__}; return a tuple of the model's "
            "arguments, such as (images,)"
        )
    return tree_map(_to_channels_last, inputs) if precision.channels_last else inputs


def autocast(device: torch.device, precision: Precision, sharded: bool) -> AbstractContextManager[Any]:
    """bf16 or fp16 for the model's forward, unless it is fp32, or ``sharded``: FSDP2 then casts by itself."""
    dtype = COMPUTE.get(precision.compute)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None and not sharded)


def losses_of(task: Task, outputs: Any, batch: Batch, precision: Precision) -> tuple[Any, Tensor]:
    """The outputs as the task gets them, in fp32, and its losses, float32 [n].

    Raises :class:`UserError` where there is not one loss for each sample.
    """
    if precision.compute != "fp32":
        outputs = tree_map(_to_float, outputs)
    losses = task.loss(outputs, batch)
    if losses.shape != batch.weight.shape:
        raise UserError(
            f"{type(task).__name__}.loss() returned shape {tuple(losses.shape)} for {len(batch)} samples; "
            "return one value per sample (reduction='none')"
        )
    return outputs, losses.float()


def joined(parts: list[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
    """Predictions and losses of micro-batches, as of one batch."""
    whole: tuple[Any, Tensor] = parts[0] if len(parts) == 1 else tree_map(lambda *some: torch.cat(some), *parts)
    return whole


def _to_channels_last(value: Any) -> Any:
    return (
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
    )


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
