"""What a rank has of the model's tensors, and whether it speaks for the ranks that have the same.

Of a tensor that several ranks hold alike one of them counts, tensor after tensor another one, so that sums over all
ranks have every element once and the work is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from dltrain.mesh import Mesh

AXES = ("dp_replicate", "dp_shard", "tp")
"""Of the mesh, along which ranks hold the same tensor or parts of it; stages of a pipeline hold others."""


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor of the model, and that tensor, maybe a DTensor; ``counts``: it is this rank's to speak
    of."""

    name: str
    local: Tensor
    counts: bool
    tensor: Tensor


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part, without a graph."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def split_on(tensor: Tensor) -> frozenset[str]:
    """The axes of the mesh along which ranks have different parts of the tensor."""
    if not isinstance(tensor, DTensor):
        return frozenset()
    axes = zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True)
    return frozenset(axis for axis, placement in axes if not placement.is_replicate())


def counted(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, bool]:
    """Whether this rank counts for each of the tensors, in an order that its replicas share."""
    sizes = {axis: group.size() for axis in AXES if (group := mesh.axis_group(axis)) is not None}
    found = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        alike = [axis for axis in sizes if axis not in split_on(tensor)]
        mine = 0
        for axis in alike:
            mine = mine * sizes[axis] + mesh.place_on(axis)
        found[name] = mine == place % math.prod(sizes[axis] for axis in alike)
    return found
