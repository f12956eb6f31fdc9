"""What a recipe supplies (:class:`Task`), and what passes between loader, engine and hooks (:class:`Batch`, :class:`Loss`).

A task knows nothing about devices, ranks or micro-batches: those are the engine's. It decodes a sample, builds a model,
says what goes into it, and returns one loss value per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dltrain.data.decode import decode_fields
from dltrain.data.sample import Sample

if TYPE_CHECKING:
    from dltrain.config import Config
    from dltrain.data.windows import Window
    from dltrain.metrics.base import Metric
    from dltrain.parallel.plan import Plan

__all__ = ["Batch", "Loss", "Sample", "Task"]


@dataclass(frozen=True)
class Batch:
    """Samples of one rank in one step.

    ``fields`` are tensors with samples first; ``weight`` is float32 [n], 0 for padding and 1 otherwise unless the data
    says differently; ``position`` is int64 [n], -1 for padding; ``keys`` name the samples.
    """

    fields: Mapping[str, Tensor]
    weight: Tensor
    keys: tuple[str, ...]
    position: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """The same batch on ``device``; copies from pinned memory do not wait."""
        moved = {
            name: value.to(
                device,
                non_blocking=True,
                memory_format=torch.channels_last if channels_last and value.dim() == 4 else torch.preserve_format,
            )
            for name, value in self.fields.items()
        }
        return replace(self, fields=moved, weight=self.weight.to(device, non_blocking=True))

    def split(self, micro_batch: int) -> Iterator[Batch]:
        """Pieces of at most ``micro_batch`` samples; 0 keeps the batch whole."""
        if not micro_batch or micro_batch >= len(self):
            yield self
            return
        for start in range(0, len(self), micro_batch):
            part = slice(start, start + micro_batch)
            fields = {name: value[part] for name, value in self.fields.items()}
            yield Batch(fields, self.weight[part], self.keys[part], self.position[part])

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (torch's loader calls this)."""
        return replace(
            self, fields={k: v.pin_memory() for k, v in self.fields.items()}, weight=self.weight.pin_memory()
        )


@dataclass(frozen=True)
class Loss:
    """A loss as the sum over samples and the count it is divided by; both float scalars on the device."""

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count


class Task:
    """What is trained: data, model, loss and metrics of one recipe. Derive and fill in."""

    def __init__(self, config: Config) -> None:
        self.config: Any = config

    def window(self) -> Window | None:
        """For time series: the windows that are the samples; ``None`` where a member of a shard is one."""
        return None

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays of one sample by field name, of equal shape in every sample.

        ``random`` is seeded by (seed, position) for augmentation, ``None`` in evaluation. The default decodes every
        field by its extension.
        """
        return decode_fields(sample)

    def model(self) -> nn.Module:
        """The model on the CPU with its initial weights; called under the run's seed on every rank."""
        raise NotImplementedError(f"{type(self).__name__} must return its model from model()")

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Positional arguments of the model's forward."""
        raise NotImplementedError(f"{type(self).__name__} must return the model's arguments from inputs()")

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """One value per sample [n], float32: the sum over what :meth:`count` counts, without weights."""
        raise NotImplementedError(f"{type(self).__name__} must return one loss per sample from loss()")

    def count(self, batch: Batch) -> Tensor:
        """What each sample counts, float [n], known before the forward pass: 1, or its number of targets."""
        return torch.ones_like(batch.weight)

    def metrics(self) -> Metric:
        """A fresh metric for one evaluation."""
        raise NotImplementedError(f"{type(self).__name__} must return a metric from metrics()")

    def plan(self) -> Plan | None:
        """How the model is sharded; ``None`` finds its blocks by structure (``Plan.auto``)."""
        return None
