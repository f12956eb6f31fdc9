"""A task that spreads its model over the ranks by itself: what is asked of the model it returns.

Everything after that is the library's: the optimizer, clipping, the loop, evaluation and checkpoints go by the
parameters' names and take plain tensors and DTensors alike.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.optimizer import build_optimizer
from dltrain.parallel.batch_norm import synchronise
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.update import trained
from dltrain.task import Task


def brings_its_own(task: Task) -> bool:
    """Whether the task defines ``parallelize``."""
    return type(task).parallelize is not Task.parallelize


def parallelize_by_task(task: Task, model: nn.Module, config: Config, mesh: Mesh, device: torch.device) -> PlainEngine:
    """The engine of what ``task.parallelize`` makes of the model, on more than one rank.

    Raises :class:`UserError` for a pipeline, and for what is returned when it is no module, trains other parameters
    than the model, or would leave the gradients of data ranks apart.
    """
    what = f"{type(task).__name__}.parallelize()"
    if mesh.pp > 1:
        raise UserError(f"{what} spreads a whole model, and parallel.pp is {mesh.pp}; give parallel.pp 1")
    assert mesh.devices is not None
    _refuse(what, config)
    names = trained(model)
    if config.precision.batch_norm == "synchronised":
        synchronise(model, mesh.data_group())
    wrapped = task.parallelize(model.to(device), mesh.devices, config)
    if not isinstance(wrapped, nn.Module):
        raise UserError(f"{what} returned {type(wrapped).__name__}, not a torch.nn.Module")
    spread: nn.Module = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    changed = sorted(set(names) ^ set(trained(spread)))
    if changed:
        raise UserError(f"{what} changed which parameters there are: {changed[0]!r}; it must keep their names")
    if mesh.data_ranks > 1 and not isinstance(wrapped, FSDPModule | DistributedDataParallel):
        raise UserError(
            f"{what} returned a {type(wrapped).__name__} that is neither fully_shard'ed nor in "
            f"DistributedDataParallel, so the gradients of {mesh.data_ranks} data ranks would stay apart; do one of "
            "the two to the whole model"
        )
    met = _ranks(wrapped)
    if met < mesh.data_ranks:
        raise UserError(
            f"{what} has gradients meet over {met} rank(s), and there are {mesh.data_ranks} with samples of their own; "
            'give fully_shard mesh["dp_replicate", "dp_shard"], or set parallel.dp_shard to all of them'
        )
    return PlainEngine(task, spread, wrapped, build_optimizer(spread, config.optim, names), config, device, mesh)


def _ranks(wrapped: nn.Module) -> int:
    """Over how many ranks FSDP2 or DDP averages gradients of the whole model; 1 for neither."""
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.process_group.size()
    if not isinstance(wrapped, FSDPModule):
        return 1
    groups = [parameter.device_mesh.size() for parameter in wrapped.parameters() if isinstance(parameter, DTensor)]
    return min(groups, default=1)  # of layers that are split besides, more


def _refuse(what: str, config: Config) -> None:
    """Settings that the library's own plans carry out."""
    parallel, precision = config.parallel, config.precision
    asked = {
        "parallel.engine deepspeed": parallel.engine == "deepspeed",
        "parallel.cp": parallel.cp > 1,
        "parallel.sequence": parallel.sequence,
        "parallel.meta": parallel.meta,
        "parallel.activation_checkpointing": parallel.activation_checkpointing != "none",
        "precision.reduce": precision.reduce != "fp32",
        "precision.float8": precision.float8,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UserError(f"{name} is for the library to do, and {what} spreads the model by itself; leave it out")
