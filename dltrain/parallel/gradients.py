"""The global gradient norm, and clipping by it, under every layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradients_of(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients of the model, a float32 scalar equal on every rank.

    Gradients on one mesh with one placement form a group: their squares are summed locally, then over the mesh axes
    they are sharded on; plain tensors are whole on every rank. torch's own function fails on mixed meshes.
    """
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(key, []).append(gradient)
    norms = [_group_norm(group) for group in groups.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most ``max_norm``; never looks at a value on the host."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([_local(gradient) for gradient in gradients], scale)


def _group_norm(group: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm([_local(gradient) for gradient in group], 2.0, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    first = group[0]
    if not isinstance(first, DTensor):
        return norm
    square = norm.square()
    for axis, placement in enumerate(first.placements):
        if not placement.is_replicate():  # Shard, or the kind that FSDP2 makes of layers that are split already
            dist.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square.sqrt()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
