"""Data parallelism: DDP for replicas alone, FSDP2 for shards and for replicas of shards (HSDP)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dltrain.config import Config
from dltrain.mesh import Mesh
from dltrain.parallel.plan import Plan


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """DDP. Buffers are kept equal by the engine, once per step under every layout."""
    device_ids = [device] if device.type == "cuda" else None
    # torch 2.13 gave the argument a new name
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **buffers)


def shard(model: nn.Module, plan: Plan, mesh: Mesh, config: Config) -> nn.Module:
    """FSDP2: shards every unit of the plan, then what is left with the root. Keeps the weights the model has."""
    compute = torch.bfloat16 if config.precision.compute == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for unit in plan.modules(model):
        fully_shard(
            unit,
            mesh=mesh.shard_axes(),
            mp_policy=policy,
            reshard_after_forward=config.parallel.reshard_after_forward,
        )
    fully_shard(model, mesh=mesh.shard_axes(), mp_policy=policy)
    return model


class BufferSync:
    """Gives every rank rank 0's floating-point buffers (running statistics of norms), packed into one broadcast."""

    def __init__(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._buffers = buffers if dist.is_initialized() and dist.get_world_size() > 1 else []

    @torch.no_grad()
    def __call__(self) -> None:
        if not self._buffers:
            return
        packed = torch.cat([buffer.reshape(-1).double() for buffer in self._buffers])
        dist.broadcast(packed, src=0)
        parts: tuple[Tensor, ...] = torch.split(packed, [buffer.numel() for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.reshape(buffer.shape))
