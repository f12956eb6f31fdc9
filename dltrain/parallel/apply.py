"""Applying the plan: from a task to an engine, the order said out loud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.freezing import freeze
from dltrain.optim.optimizer import build_optimizer
from dltrain.parallel.agreement import refuse_untied, tied
from dltrain.parallel.batch_norm import synchronise
from dltrain.parallel.data import replicate, shard
from dltrain.parallel.deepspeed.engine import DeepSpeedEngine, deepspeed_engine
from dltrain.parallel.forward import inputs_of
from dltrain.parallel.own import brings_its_own, parallelize_by_task
from dltrain.parallel.pipeline.engine import PipelineEngine
from dltrain.parallel.pipeline.parts import Parts, part
from dltrain.parallel.pipeline.trace import adopt
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import split, splits_of
from dltrain.parallel.ties import refuse_split_ties, self_contained
from dltrain.parallel.tokens import roles_of, share_context, share_sequence
from dltrain.parallel.update import trained
from dltrain.parallel.weights import Weights
from dltrain.runtime.seeds import seed_all
from dltrain.task import Task

Example = Callable[[], Batch]
"""Some batch of training samples, on the host."""


def parallelize(
    task: Task,
    config: Config,
    mesh: Mesh,
    device: torch.device,
    example: Example | None = None,
    weights: Weights | None = None,
) -> PlainEngine | PipelineEngine | DeepSpeedEngine:
    """Build the model and spread it over the mesh.

    1. Build on the CPU under the run's seed, and fill in ``weights`` that were trained before: the same on every rank,
       whatever the layout. What is frozen is so from here on. A task that spreads its model by itself does so now,
       instead of what follows.
    2. Find what the plan names, in the whole model.
    3. Keep this rank's stages of a pipeline, cut so that they cost about the same for the ``example``, which a pipeline
       alone needs. Batch norms take their statistics over all data ranks, if they are to.
    4. Move to the device, in the memory format asked for.
    5. Split layers over the ranks of tensor parallelism; share tokens out over those of context parallelism.
    6. Compile: each unit where units are sharded, the whole model, or each stage, otherwise.
    7. DeepSpeed, where it is chosen, which shards by itself and has the optimizer inside. Otherwise:
    8. FSDP2 over the plan's units, or DDP for replicas alone. Replicas of split layers and of stages are FSDP2's too,
       in shards of one: DDP takes no split tensors, and a stage goes backward many times in a step.
    9. The optimizer, last, for it must hold the parameters that are trained.
    """
    model = _built(task, config, weights)
    if brings_its_own(task) and mesh.devices is not None:
        return parallelize_by_task(task, model, config, mesh, device)
    plan, names, ties = task.plan() or Plan.auto(model), trained(model), tied(model)
    units = plan.modules(model)
    splits = splits_of(model, plan, mesh.tp) if mesh.tp > 1 else []
    refuse_split_ties(model, splits)
    sequence = config.parallel.sequence and mesh.tp > 1
    shared = "parallel.sequence is on" if sequence else f"parallel.cp is {mesh.cp}"
    roles = roles_of(model, plan, shared) if sequence or mesh.cp > 1 else []
    sharded = mesh.dp_shard > 1 or (mesh.reduced_ranks > 1 and mesh.tp * mesh.pp > 1)
    parts = _part(task, model, plan, config, mesh, device, example) if mesh.pp > 1 else None
    if config.precision.batch_norm == "synchronised":
        synchronise(model, mesh.data_group())
    here = set(model.modules())
    units = [] if parts is not None and parts.size else [unit for unit in units if unit in here]
    model = model.to(device)
    zero = config.parallel.engine == "deepspeed"
    if config.precision.channels_last and not (sharded or zero):  # shards are of contiguous weights; inputs are enough
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    roles = [each for each in roles if each.module in here]
    if splits:
        split([each for each in splits if each.layer in here], mesh.tensor_axis(), sequence)
    if mesh.context is not None:
        share_context(roles, mesh.context)
    if sequence:
        share_sequence(roles, mesh.tensor_axis())
    roots: Sequence[nn.Module] = [model] if parts is None else list(parts.stages.values())
    if config.precision.compile:
        for module in units if sharded else roots:
            module.compile()
    if zero:
        return deepspeed_engine(task, model, config, mesh, device)
    wrapped = model
    if sharded:
        for root in roots:
            mine = set(root.modules())
            shard(root, self_contained(root, [unit for unit in units if unit in mine]), mesh, config)
        if parts is not None and parts.size:
            adopt(model, roots)
    elif parts is None and mesh.reduced_ranks > 1:
        wrapped = replicate(model, device)
    refuse_untied(model, ties)
    optimizer = build_optimizer(model, config.optim, names)
    if parts is not None:
        return PipelineEngine(task, parts, optimizer, config, device, mesh, names)
    return PlainEngine(task, model, wrapped, optimizer, config, device, mesh)


def _built(task: Task, config: Config, weights: Weights | None) -> nn.Module:
    """The whole model on the CPU, with the weights it starts from."""
    seed_all(config.run.seed)
    model = task.model()
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() returned {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        weights.fill(model)
    freeze(model, config.optim.frozen)
    return model


def _part(
    task: Task, model: nn.Module, plan: Plan, config: Config, mesh: Mesh, device: torch.device, example: Example | None
) -> Parts:
    """Cut the model, in place, to this rank's stages."""
    if example is None:
        raise AssertionError("a pipeline is cut by an example")
    batch = example().to(device).to(torch.device("cpu"))  # images may be decoded by the device

    def inputs(samples: int) -> tuple[Any, ...]:
        piece = next(batch.padded(max(samples, len(batch))).split(samples))
        return inputs_of(task, piece, config.precision)

    return part(model, plan, config.parallel, mesh.pp_rank, len(batch), inputs)
