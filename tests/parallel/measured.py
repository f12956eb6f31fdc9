"""Counting what a rank has allocated while it trains: every tensor's storage, from the moment it is seen to its end."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.mesh import build_mesh
from dltrain.models.vision import vit
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.task import Task

CPU = torch.device("cpu")
BATCH = 64


class Wide(Task):
    """A ViT whose weights and activations take about as much memory."""

    def model(self) -> nn.Module:
        return vit.ViT(16, 4, 3, 10, depth=4, width=128, heads=4)

    def plan(self) -> Plan:
        return vit.PLAN

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["y"], reduction="none")


def batch_of(samples: int) -> Batch:
    fields = {"x": torch.randn(samples, 3, 16, 16), "y": torch.zeros(samples, dtype=torch.long)}
    return Batch(fields, torch.ones(samples), tuple(map(str, range(samples))), torch.arange(samples))


class Allocated(TorchDispatchMode):
    """``peak``: bytes of all storages seen so far that are alive, at most. FSDP2 empties and fills some in place."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.peak = 0
        self._note(tensors)

    def _note(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = weakref.ref(storage, lambda _, key=key: self._alive.pop(key, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with what a rank has
        self._note((args, kwargs))
        returned = func(*args, **(kwargs or {}))
        self._note(returned)
        alive = [storage for storage in (each() for each in list(self._alive.values())) if storage is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))
        return returned


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure(rank: int, ranks: int, overrides: dict[str, Any]) -> int:
    """The peak of steps 2 and 3."""
    config = load_overrides(Config(), overrides)
    task = Wide(config)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(task, config, mesh, CPU, lambda: batch_of(BATCH // mesh.data_ranks))
    engine.settle(lambda: batch_of(BATCH // mesh.data_ranks))
    count = torch.tensor(float(BATCH))

    def step() -> None:
        engine.forward_backward(batch_of(BATCH // mesh.data_ranks), count)
        engine.step(0.001, 1.0)

    step()
    states = [local(value) for state in engine.optimizer.state.values() for value in state.values()]
    with Allocated([*(local(each) for _, each in engine.named_parameters()), *states]) as allocated:
        step()
        step()
    return allocated.peak
