"""What a recipe supplies (:class:`Task`), and what passes between loader, engine and hooks (``Batch``, :class:`Loss`).

A task knows nothing about devices, ranks or micro-batches: those are the engine's. It decodes a sample, builds a model,
says what goes into it, and returns one loss value per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dltrain.data.batch import Batch
from dltrain.data.decode import decode_fields
from dltrain.data.sample import Sample
from dltrain.errors import UserError

if TYPE_CHECKING:
    from dltrain.config import Config
    from dltrain.data.windows import Window
    from dltrain.debugger.rules.base import Rule
    from dltrain.hooks.base import Hook
    from dltrain.metrics.base import Metric
    from dltrain.parallel.plan import Plan

__all__ = ["Batch", "Loss", "Sample", "Task"]


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
        self.facts: dict[str, Any] = {}
        """What the manifest of the training data says of them: class names, scales. Set before the first sample."""

    def window(self) -> Window | None:
        """For time series: the windows that are the samples; ``None`` where a member of a shard is one."""
        return None

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, Any]:
        """Arrays of one sample by field name, of equal shape in every sample; or images still encoded, by
        :func:`~dltrain.data.decode.encode_crop`.

        ``random`` is seeded by (seed, position) for augmentation, ``None`` in evaluation. The default decodes every
        field by its extension.
        """
        return decode_fields(sample)

    def model(self) -> nn.Module:
        """The model on the CPU with its initial weights; called under the run's seed on every rank."""
        raise UserError(f"{type(self).__name__} must return its model from model()")

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Positional arguments of the model's forward."""
        raise UserError(f"{type(self).__name__} must return the model's arguments from inputs()")

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """One value per sample [n], float32: the sum over what :meth:`count` counts, without weights."""
        raise UserError(f"{type(self).__name__} must return one loss per sample from loss()")

    def count(self, batch: Batch) -> Tensor:
        """What each sample counts, float [n], known before the forward pass: 1, or its number of targets."""
        return torch.ones_like(batch.weight)

    def predictions(self, outputs: Any, batch: Batch) -> Any:
        """What metrics are given, from the model's outputs: as they are, by default."""
        return outputs

    def metrics(self) -> Metric:
        """A fresh metric for one evaluation."""
        raise UserError(f"{type(self).__name__} must return a metric from metrics()")

    def hooks(self) -> list[Hook]:
        """Hooks of the recipe's own, made on every rank."""
        return []

    def rules(self) -> list[Rule]:
        """Rules of the recipe's own, which watch the run where the debugger is on (``debugger.every``)."""
        return []

    def plan(self) -> Plan | None:
        """How the model is sharded; ``None`` finds its blocks by structure (``Plan.auto``)."""
        return None

    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        """Spread the model over the ranks by your own hand, in place of what the library does by the plan.

        Called on more than one rank, if you define it, with the whole model on the device and torch's mesh of the axes
        ``pp``, ``dp_replicate``, ``dp_shard`` and ``tp``. Return the model by ``fully_shard`` or in
        ``DistributedDataParallel``, over ``mesh["dp_replicate", "dp_shard"]``, its parameters under the names they
        have; bf16 (``MixedPrecisionPolicy``) and compilation are yours, too.
        """
        raise AssertionError("called where a task defines it")
