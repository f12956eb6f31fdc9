"""Layouts by hand: what a careful user of plain PyTorch writes, nothing of dltrain but the model.

Every loop measures the global gradient norm and clips by it, with torch's own functions where they can, and updates
with the fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from benchmarks.case import Case


class BareParallelLoop:
    """``layout`` is one of :data:`LAYOUTS`; called on every rank."""

    def __init__(self, case: Case, layout: str) -> None:
        torch.manual_seed(case.seed)
        self._case = case
        self.model: nn.Module = case.build()
        self._forward_backward, self._pipeline = LAYOUTS[layout](self.model, case)
        parameters = list(self.model.parameters())
        if self._pipeline is not None:
            parameters = list(self._pipeline.parameters())
        groups = [_group(parameters, case, decays) for decays in (True, False)]
        self._optimizer = AdamW([part for group in groups for part in group], lr=case.learning_rate, fused=True)
        self._parameters = parameters

    def prepare(self, steps: int) -> Callable[[], object]:
        """What trains for ``steps`` when called."""
        return partial(self._train, steps)

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            self._forward_backward()
            self._clip()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> None:
        """torch's own function takes no mixture of plain and split tensors, and knows nothing of pipelines."""
        owned: dict[Any, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            key = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            owned.setdefault(key, []).append(parameter)
        norms = [
            get_total_norm([p.grad for p in owners if p.grad is not None], foreach=True) for owners in owned.values()
        ]
        square = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).square().sum()
        if self._pipeline is not None:
            dist.all_reduce(square)
        for owners in owned.values():
            clip_grads_with_norm_(owners, self._case.max_norm, square.sqrt(), foreach=True)


def _group(parameters: Sequence[nn.Parameter], case: Case, decays: bool) -> list[dict[str, Any]]:
    """A group for each kind of tensor: the fused kernel takes one at a time."""
    mine = [parameter for parameter in parameters if (parameter.dim() >= 2) == decays]
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in mine:
        kinds.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    decay = case.weight_decay if decays else 0.0
    return [{"params": some, "weight_decay": decay} for some in kinds.values()]


Step = Callable[[], object]


def _plain_step(model: nn.Module, case: Case) -> Step:
    def step() -> None:
        loss = F.cross_entropy(model(case.prepare(case.inputs)), case.targets)
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def _ddp(model: nn.Module, case: Case) -> tuple[Step, None]:
    return _plain_step(DistributedDataParallel(model, gradient_as_bucket_view=True), case), None


def _shard(model: nn.Module, mesh: DeviceMesh | None) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fsdp(model: nn.Module, case: Case) -> tuple[Step, None]:
    _shard(model, None)
    return _plain_step(model, case), None


def _split(model: nn.Module, mesh: DeviceMesh) -> None:
    columns = ("attention.query", "attention.key", "attention.value", "mlp.up")
    for block in model.blocks:  # type: ignore[union-attr]
        plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("attention.out", "mlp.down")}
        parallelize_module(block, mesh, plan)


def _tp(model: nn.Module, case: Case) -> tuple[Step, None]:
    _split(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return _plain_step(model, case), None


def _fsdp_tp(model: nn.Module, case: Case) -> tuple[Step, None]:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    _split(model, mesh["tp"])
    _shard(model, mesh["dp"])
    return _plain_step(model, case), None


class _Contiguous(nn.Module):
    """torch's stages send no other tensors."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.contiguous()


def _pp(model: nn.Module, case: Case) -> tuple[Step, nn.Module]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    links = [model.embed, *model.blocks, model.head]  # type: ignore[misc]
    half = len(links) // 2
    part = nn.Sequential(*([*links[:half], _Contiguous()] if rank == 0 else links[half:]))
    stage = PipelineStage(part, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=F.cross_entropy)

    def step() -> None:
        if rank == 0:
            schedule.step(case.prepare(case.inputs))
        else:
            schedule.step(target=case.targets, losses=[])

    return step, part


MICRO_BATCHES = 4

LAYOUTS: dict[str, Callable[[nn.Module, Case], tuple[Step, nn.Module | None]]] = {
    "ddp 2": _ddp,
    "fsdp 2": _fsdp,
    "tp 2": _tp,
    "pp 2": _pp,
    "fsdp 2 x tp 2": _fsdp_tp,
}
