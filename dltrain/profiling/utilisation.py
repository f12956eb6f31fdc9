"""How much of what the devices could compute a run uses: model FLOPs utilisation (MFU), after Chowdhery et al. 2022.

A sample's floating-point operations are counted once, by torch's counter, of the whole model on the meta device; a
backward pass counts twice a forward pass, and what checkpointing computes again counts nothing. Peaks are those of
:mod:`dltrain.parallel.devices`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.hooks.base import Hook, View
from dltrain.parallel.devices import DEVICES
from dltrain.parallel.forward import inputs_of
from dltrain.parallel.rehearsal import META, on_meta
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.task import Task

_SAMPLES = 2
"""Some models refuse a batch of one."""


def flops_of(task: Task, config: Config, batch: Batch) -> float:
    """Floating-point operations of a sample's forward and backward pass: matrix products and convolutions."""
    task = copy_of(task, config)
    with META:
        model: nn.Module = task.model()
    model.to(META).train()
    inputs = inputs_of(task, on_meta(batch, _SAMPLES), config.precision)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return 3.0 * counter.get_total_flops() / _SAMPLES


def copy_of(task: Task, config: Config) -> Task:
    """Another one like it: a task may keep what its ``model()`` made."""
    other = type(task)(config)
    other.facts = task.facts
    return other


def peak_of(device: torch.device, config: Config) -> float:
    """FLOPs per second of a device at its best, by ``profiler.peak_tflops`` or by its name; 0 where it is unknown."""
    if config.profiler.peak_tflops:
        return config.profiler.peak_tflops * 1e12
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).lower()
    known = [each for key, each in DEVICES.items() if key.partition("-")[0] in name.replace(" ", "")]
    compute, matmul = config.precision.compute, config.precision.matmul
    return known[-1].peak(compute, matmul) if known else 0.0


class Utilisation(Hook):
    """Adds ``tflops`` of each rank, and ``mfu`` where the peak is known, to the records of logged steps."""

    def __init__(self, task: Task, config: Config, environment: Environment) -> None:
        self._task, self._config, self._environment = task, config, environment
        self._flops = self._peak = 0.0

    def fit_start(self, trainer: View) -> None:
        try:
            self._flops = flops_of(self._task, self._config, trainer.loader.peek())
        except Exception as error:  # noqa: BLE001 - a forward may do on real values what it cannot on shapes
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            warn(self._environment, f"FLOPs are not counted: the model does not run on the meta device ({reason})")
        self._peak = peak_of(trainer.engine.device, self._config)

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        if self._flops:
            rate = self._flops * record["samples_per_second"] / self._environment.world_size
            record["tflops"] = rate / 1e12
            if self._peak:
                record["mfu"] = rate / self._peak
