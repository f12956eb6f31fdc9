"""Whether the backend averages as it says: FSDP2 leaves the division of gradients to it.

Some builds of torch sum in gloo's reduce-scatter where an average is asked for (pytorch#162338), so that gradients on
CPUs are larger by the number of shards, and training goes on, wrongly. A few bytes tell before the first step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn

SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""What FSDP2 calls: torch 2.13 gave it a new name."""


def mend_average(model: nn.Module, mesh: DeviceMesh, environment: Environment) -> None:
    """Have the FSDP2 units of ``model`` sum and divide by themselves where gloo's average is not one; collective."""
    if mesh.device_type != "cpu" or all(averages(group) for group in mesh.get_all_groups()):
        return
    warn(
        environment,
        f"gloo of torch {torch.__version__} does not average where it should (pytorch#162338): gradients are summed "
        "and divided instead",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def averages(group: dist.ProcessGroup) -> bool:
    """Whether ones are 1 on average, both scattered and everywhere; the same on every rank; collective."""
    ones = torch.ones(group.size())
    part, everywhere = torch.zeros(1), torch.ones(1)
    try:
        getattr(dist, SCATTER)(part, ones, dist.ReduceOp.AVG, group)
        dist.all_reduce(everywhere, dist.ReduceOp.AVG, group)
    except (RuntimeError, ValueError):  # a build without averages refuses them on every rank, before it sends anything
        return False
    return part.item() == everywhere.item() == 1.0
