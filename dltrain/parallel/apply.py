"""Applying the plan: from a task to an engine, the order said out loud."""

from __future__ import annotations

import torch
from torch import nn

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.optimizer import build_optimizer
from dltrain.parallel.data import replicate, shard
from dltrain.parallel.deepspeed import deepspeed_engine
from dltrain.parallel.engine import PlainEngine
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import split
from dltrain.runtime.seeds import seed_all
from dltrain.task import Task


def parallelize(task: Task, config: Config, mesh: Mesh, device: torch.device) -> PlainEngine:
    """Build the model and spread it over the mesh.

    1. Build on the CPU under the run's seed: the same weights on every rank, whatever the layout.
    2. Move to the device, in the memory format asked for.
    3. Split layers over the ranks of tensor parallelism.
    4. Compile: each unit where units are sharded, the whole model otherwise.
    5. DeepSpeed, where it is chosen, which shards by itself and has the optimizer inside. Otherwise:
    6. FSDP2 over the plan's units, or DDP for replicas alone. Replicas of split layers are FSDP2's too, in shards of
       one: DDP takes no split tensors.
    7. The optimizer, last, for it must hold the parameters that are trained.
    """
    seed_all(config.run.seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() returned {type(model).__name__}, not a torch.nn.Module")
    model = model.to(device)
    sharded = mesh.dp_shard > 1 or (mesh.tp > 1 and mesh.data_ranks > 1)
    zero = config.parallel.engine == "deepspeed"
    if config.precision.channels_last and not (sharded or zero):  # shards are of contiguous weights; inputs are enough
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = task.plan() or Plan.auto(model)
    if mesh.tp > 1:
        split(model, plan, mesh.tensor_axis())
    if config.precision.compile:
        for part in plan.modules(model) if sharded else [model]:
            part.compile()
    if zero:
        return deepspeed_engine(task, model, config, mesh, device)
    wrapped = model
    if sharded:
        wrapped = shard(model, plan, mesh, config)
    elif mesh.dp_replicate > 1:
        wrapped = replicate(model, device)
    optimizer = build_optimizer(model, config.optim)
    return PlainEngine(task, model, wrapped, optimizer, config, device, mesh.data_ranks, mesh.counts)
