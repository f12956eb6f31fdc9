"""Applying the plan: from a task to an engine, the order said out loud."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.optimizer import build_optimizer
from dltrain.parallel.checkpointing import checkpoint_units
from dltrain.parallel.compiling import compile_each
from dltrain.parallel.data import is_sharded, replicate, shard
from dltrain.parallel.forward import inputs_of
from dltrain.parallel.meta import built_on_meta
from dltrain.parallel.pipeline.cut import Stage, balanced, chain, costs_of, keep
from dltrain.parallel.pipeline.engine import Parts, PipelineEngine
from dltrain.parallel.pipeline.schedule import build, micro_batches, stages_per_rank
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.plan import Plan
from dltrain.parallel.refuse import refuse
from dltrain.parallel.tensor import split, splits_of
from dltrain.parallel.update import trained
from dltrain.runtime.seeds import seed_all
from dltrain.task import Task

Example = Callable[[], Batch]
"""Some batch of training samples, on the host."""


def parallelize(
    task: Task, config: Config, mesh: Mesh, device: torch.device, example: Example | None = None
) -> PlainEngine | PipelineEngine:
    """Build the model and spread it over the mesh.

    1. Build on the CPU under the run's seed: the same weights on every rank, whatever the layout; or without memory,
       to be filled after step 8.
    2. Find what the plan names, in the whole model.
    3. Keep this rank's stages of a pipeline, cut so that they cost about the same for the ``example``, which a pipeline
       alone needs.
    4. Move to the device, in the memory format asked for.
    5. Split layers over the ranks of tensor parallelism.
    6. Activation checkpointing of the units.
    7. Compile: the whole model of one process; of several, each unit, so that gradients are reduced while the backward
       pass goes on.
    8. FSDP2 over the plan's units, or DDP for replicas alone. Replicas of split layers and of stages are FSDP2's too,
       in shards of one: DDP takes no split tensors, and a stage goes backward many times in a step.
    9. The optimizer, last, for it must hold the parameters that are trained.
    """
    refuse(config, mesh)
    seed_all(config.run.seed)
    model, blueprint = built_on_meta(task.model) if config.parallel.meta else (task.model(), None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() returned {type(model).__name__}, not a torch.nn.Module")
    plan, names = task.plan() or Plan.auto(model), trained(model)
    units = plan.modules(model)
    splits = splits_of(model, plan, mesh.tp) if mesh.tp > 1 else []
    sharded = is_sharded(mesh)
    parts = _part(task, model, plan, config, mesh, device, example) if mesh.pp > 1 else None
    here = set(model.modules())
    units = [unit for unit in units if unit in here]
    if blueprint is None:
        model = _placed(model, device, config.precision.channels_last and not sharded)
    if splits:
        split([each for each in splits if each.layer in here], mesh.tensor_axis())
    roots: Sequence[nn.Module] = [model] if parts is None else list(parts.stages.values())
    checkpoint_units(units, config)
    if config.precision.compile:
        compile_each((units if mesh.environment.world_size > 1 else []) or roots)
    wrapped = model
    if sharded:
        for root in roots:
            mine = set(root.modules())
            shard(root, [unit for unit in units if unit in mine], mesh, config)
    if blueprint is not None:
        blueprint.fill(roots, config.run.seed, device, torch.device("cpu") if config.parallel.offload else device)
        model = model if sharded else _placed(model, device, config.precision.channels_last)
    if not sharded and parts is None and mesh.dp_replicate > 1:
        wrapped = replicate(model, device, config.parallel)
    optimizer = build_optimizer(model, config.optim, names)
    if parts is not None:
        return PipelineEngine(task, parts, optimizer, config, device, mesh)
    return PlainEngine(task, model, wrapped, optimizer, config, device, mesh)


def _placed(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """On the device, in the memory format asked for; FSDP2 shards contiguous weights, and there inputs are enough."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload]


def _part(
    task: Task, model: nn.Module, plan: Plan, config: Config, mesh: Mesh, device: torch.device, example: Example | None
) -> Parts:
    """Cut the model, in place, to this rank's stages."""
    if example is None:
        raise AssertionError("a pipeline is cut by an example")
    parallel, names = config.parallel, trained(model)
    links = chain(model, plan)
    batch = example()
    stages = mesh.pp * (parallel.stages_per_rank or stages_per_rank(parallel.schedule))
    pieces, _ = micro_batches(len(batch), parallel.micro_batch, stages, mesh.pp)
    owners = build(parallel.schedule, mesh.pp, pieces, parallel.stages_per_rank).owners
    if len(links) < len(owners):
        raise UserError(
            f"parallel.pp {mesh.pp} makes {len(owners)} stages, and the plan of {type(model).__name__} names "
            f"{len(links)} modules to share out; give parallel.pp or parallel.stages_per_rank less, or a deeper model"
        )
    one = next(batch.split(1)).to(device)  # which may decode it
    cuts = balanced(costs_of(model, links, inputs_of(task, one, config.precision)), len(owners))
    mine = {number: links[cut.start : cut.stop] for number, cut in enumerate(cuts) if owners[number] == mesh.pp_rank}
    keep(model, links, [link for some in mine.values() for link in some])
    return Parts(model, {number: Stage(some) for number, some in mine.items()}, owners, names)
