"""Data parallelism: DDP for replicas alone, FSDP2 for shards and for replicas of shards (HSDP)."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dltrain.config import Config, Parallel
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.parallel.averaging import mend_average
from dltrain.parallel.compression import compress
from dltrain.parallel.forward import COMPUTE


def replicate(
    model: nn.Module, device: torch.device, parallel: Parallel, find_unused: bool = False
) -> DistributedDataParallel:
    """DDP. Buffers are kept equal by the engine, once per step under every layout.

    With ``find_unused`` it looks in each step for parameters without a gradient, and otherwise waits for all of them.
    """
    device_ids = [device] if device.type == "cuda" else None
    # torch 2.13 gave the argument a new name
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    settings: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    settings["bucket_cap_mb"] = parallel.bucket_mib or None
    settings["find_unused_parameters"] = find_unused or parallel.find_unused_parameters
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **settings)
    compress(wrapped, parallel)
    return wrapped


def refuse_unused(error: RuntimeError) -> None:
    """Raises :class:`UserError` if ``error`` is DDP's, which waited for gradients of parameters a step left out."""
    if "Expected to have finished reduction" in str(error):
        raise UserError(
            "the step before used fewer parameters than the first one, and DDP waited for their gradients; set "
            "parallel.find_unused_parameters true"
        ) from error


def shard(model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, config: Config) -> nn.Module:
    """FSDP2: shards every unit, then what is left with the root. Keeps the weights the model has.

    In a pipeline parameters stay gathered until the step's last backward pass, as in ZeRO-2: each piece would gather
    them anew.
    """
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            raise UserError(
                f"{name} of {type(model).__name__} is a scalar, which FSDP2 cannot shard; give it shape [1]"
            )
    compute = COMPUTE.get(config.precision.compute)
    reduced = torch.bfloat16 if config.precision.reduce == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduced)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.parallel.offload else OffloadPolicy()
    reshard = config.parallel.reshard_after_forward and mesh.pp == 1
    if compute is not None:
        _keep_batch_norm_in_fp32(model, mesh, compute, offload)
    for unit in [unit for unit in units if not isinstance(unit, FSDPModule)]:  # a norm may be a unit of the plan
        fully_shard(
            unit,
            mesh=mesh.shard_axes(),
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
        )
    fully_shard(model, mesh=mesh.shard_axes(), mp_policy=policy, offload_policy=offload)
    mend_average(model, mesh.shard_axes(), mesh.environment)
    if config.parallel.prefetch:
        _prefetch(model, config.parallel.prefetch)
    return model


def _prefetch(root: nn.Module, depth: int) -> None:
    """Gather ``depth`` units ahead of each, in the order of the model forward and against it backward."""
    units: list[FSDPModule] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for place, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[place + 1 : place + 1 + depth])
        if place:
            unit.set_modules_to_backward_prefetch(units[max(1, place - depth) : place][::-1])


def _keep_batch_norm_in_fp32(model: nn.Module, mesh: Mesh, compute: torch.dtype, offload: OffloadPolicy) -> None:
    """Running statistics are fp32, and batch norm wants its weights in the same type; autocast does so under DDP."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, output_dtype=compute)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            fully_shard(module, mesh=mesh.shard_axes(), mp_policy=policy, offload_policy=offload)


class BufferSync:
    """Gives every rank of ``group`` its first rank's floating-point buffers (running statistics of norms), packed into
    one broadcast; ``None`` is this process alone.

    With ``undo`` the buffers of a step whose gradient norm is not finite are put back to those of the step before.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None, undo: bool = False) -> None:
        self._group = group
        self._undo = undo
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._buffers = buffers if group is not None or undo else []
        self._last = self._packed() if self._buffers else None

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> None:
        if self._last is None:
            return
        packed = self._packed()
        if self._undo:
            packed = torch.where(norm.isfinite(), packed, self._last)
        if self._group is not None:
            dist.broadcast(packed, group=self._group, group_src=0)
        parts = torch.split(packed, [buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(self._buffers, [p.view_as(b) for p, b in zip(parts, self._buffers, strict=True)])
        self._last = packed

    def _packed(self) -> Tensor:
        return torch.cat([buffer.reshape(-1).float() for buffer in self._buffers])
