"""The global gradient norm, and clipping by it, under every layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradients_of(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class Norm:
    """The 2-norm over all gradients of the model, a float32 scalar equal on every rank.

    Gradients on one mesh with one placement form a group: their squares are summed over the mesh axes they are sharded
    on; plain tensors are whole on every rank. torch's own function fails on mixed meshes. In a ``pipeline`` every rank
    has some of the model's parameters, those at ``places`` of ``total``: their norms are put together in the order of
    the model, so that the sum is that of one process to the last bit.
    """

    def __init__(self, places: Sequence[int], total: int, device: torch.device, pipeline: dist.ProcessGroup | None):
        self._places, self._total, self._device = torch.tensor(places, dtype=torch.long, device=device), total, device
        self._pipeline = pipeline

    def __call__(self, parameters: Sequence[torch.nn.Parameter]) -> Tensor:
        """Of the parameters' gradients; collective. A parameter without one counts nothing."""
        norms = norms_of(gradients_of(parameters))
        if self._pipeline is None:
            return torch.linalg.vector_norm(torch.stack(norms))
        nothing = torch.zeros((), device=self._device)
        found = iter(norms)
        mine = [nothing if parameter.grad is None else next(found) for parameter in parameters]
        everywhere = torch.zeros(self._total, device=self._device)
        if mine:
            everywhere[self._places] = torch.stack(mine)
        dist.all_reduce(everywhere, group=self._pipeline)
        return torch.linalg.vector_norm(everywhere)


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each gradient as a whole, float32 scalars; collective."""
    if not gradients:
        return []
    norms = list(torch._foreach_norm([_local(gradient) for gradient in gradients], 2.0, dtype=torch.float32))
    groups: dict[tuple[Any, Any], list[int]] = {}
    for place, gradient in enumerate(gradients):
        if isinstance(gradient, DTensor):
            groups.setdefault((gradient.device_mesh, gradient.placements), []).append(place)
    for (mesh, placements), places in groups.items():
        square = torch.stack([norms[place] for place in places]).square()
        for axis, placement in enumerate(placements):
            if not placement.is_replicate():  # Shard, or the kind that FSDP2 makes of layers that are split already
                dist.all_reduce(square, group=mesh.get_group(axis))
        for place, norm in zip(places, square.sqrt().unbind(), strict=True):
            norms[place] = norm
    return norms


def add_up(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Gradients that are partial sums on each rank become what their parameters are; collective."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            assert isinstance(parameter, DTensor)
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most ``max_norm``; never looks at a value on the host."""
    scale_by(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def scale_by(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar on their device."""
    if gradients:
        torch._foreach_mul_([_local(gradient) for gradient in gradients], factor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece; collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
