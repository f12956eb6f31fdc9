"""Applying the plan: from a task to an engine, the order said out loud."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.optim.freezing import freeze
from dltrain.optim.optimizer import build_optimizer
from dltrain.parallel.batch_norm import synchronise
from dltrain.parallel.checkpointing import checkpoint_units
from dltrain.parallel.compiling import compile_each
from dltrain.parallel.data import replicate, shard
from dltrain.parallel.deepspeed.engine import DeepSpeedEngine, deepspeed_engine
from dltrain.parallel.float8 import multiply_in_float8
from dltrain.parallel.forward import inputs_of
from dltrain.parallel.meta import Blueprint, built_on_meta
from dltrain.parallel.own import brings_its_own, parallelize_by_task
from dltrain.parallel.pipeline.engine import PipelineEngine
from dltrain.parallel.pipeline.parts import Parts, part
from dltrain.parallel.pipeline.trace import adopt
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.plan import Plan
from dltrain.parallel.proof import prove
from dltrain.parallel.tensor import Split, split, splits_of
from dltrain.parallel.ties import refuse_split_ties, refuse_untied, self_contained, ties
from dltrain.parallel.tokens import Role, refuse_ungathered, roles_of, share_context, share_sequence
from dltrain.parallel.update import trained
from dltrain.parallel.weights import Weights
from dltrain.runtime.seeds import seed_all
from dltrain.task import Task

Example = Callable[[], Batch]
"""Some batch of training samples, on the host."""

_FEW = 2
"""Samples by which shares are proved."""


def parallelize(
    task: Task,
    config: Config,
    mesh: Mesh,
    device: torch.device,
    example: Example | None = None,
    weights: Weights | None = None,
    watch: Callable[[nn.Module], object] | None = None,
) -> PlainEngine | PipelineEngine | DeepSpeedEngine:
    """Build the model and spread it over the mesh.

    1. Build on the CPU under the run's seed, and fill in ``weights`` that were trained before: the same on every rank,
       whatever the layout; or without memory, to be filled after step 8. What is frozen is so from here on. A task that
       spreads its model by itself does so now, instead of what follows.
    2. Prove, by a few samples of the ``example``, that layers and tokens may be shared out as the plan says. Find what
       it names, in the whole model; its linear layers multiply in float8, if they are to.
    3. Keep this rank's stages of a pipeline, cut so that they cost about the same for the ``example``. Batch norms take
       their statistics over all data ranks, if they are to.
    4. Move to the device, in the memory format asked for.
    5. Split layers over the ranks of tensor parallelism; share tokens out over those of context parallelism.
    6. Activation checkpointing of the units; of whole stages, where they are traced. Who wants to ``watch`` modules may
       do so from here on; but of traces, which call none.
    7. Compile: the whole model of one process; of several, each unit, so that gradients are reduced while the backward
       pass goes on. DeepSpeed, where it is chosen, has the rest inside. Otherwise:
    8. FSDP2 over the plan's units, or DDP for replicas alone. Replicas of split layers and of stages are FSDP2's too,
       in shards of one: DDP takes no split tensors, and a stage goes backward many times in a step.
    9. The optimizer, last, for it must hold the parameters that are trained.
    """
    model, blueprint = _built(task, config, weights)
    if brings_its_own(task) and mesh.devices is not None:
        return parallelize_by_task(task, model, config, mesh, device)
    plan = task.plan() or Plan.auto(model)
    if mesh.tp * mesh.cp > 1 and config.parallel.prove and blueprint is None and example is not None:
        prove(task, model, partial(_shared, plan=plan, config=config, mesh=mesh), mesh, device, _few(example()))
    named, names, shared = _named(model, plan, config, mesh, device), trained(model), ties(model)
    parts = _part(task, model, named.plan, config, mesh, device, example) if mesh.pp > 1 else None
    traced = parts is not None and parts.traced
    if config.precision.batch_norm == "synchronised":
        synchronise(model, mesh.data_group())
    roots: Sequence[nn.Module] = [model] if parts is None else list(parts.stages.values())
    planned, named = bool(named.units), named.kept_in(model, whole=traced)
    if blueprint is None:
        model = _placed(model, device, config, mesh)
    _spread(named, config, mesh)
    checkpoint_units(list(roots) if traced else named.units, config, elsewhere=planned)
    if watch is not None and not traced:
        watch(model)
    if config.precision.compile:
        compile_each((named.units if mesh.environment.world_size > 1 else []) or roots)
    if config.parallel.engine == "deepspeed":
        return deepspeed_engine(task, model, config, mesh, device)
    if mesh.is_sharded:
        _shard(model, roots, named.units, parts, config, mesh)
    if blueprint is not None:
        blueprint.fill(roots, config.run.seed, device, torch.device("cpu") if config.parallel.offload else device)
        model = model if mesh.is_sharded else _placed(model, device, config, mesh)
    wrapped = model
    if not mesh.is_sharded and parts is None and mesh.reduced_ranks > 1:
        wrapped = replicate(model, device, config.parallel)
    refuse_untied(model, shared)
    optimizer = build_optimizer(model, config.optim, names)
    if parts is not None:
        return PipelineEngine(task, parts, optimizer, config, device, mesh, names)
    return PlainEngine(task, model, wrapped, optimizer, config, device, mesh)


@dataclass(frozen=True)
class _Named:
    """What a plan names in a model."""

    plan: Plan
    units: list[nn.Module]
    splits: list[Split]
    roles: list[Role]

    def kept_in(self, model: nn.Module, whole: bool) -> _Named:
        """What is left of it in a part of the model; a part that is traced as a ``whole`` has no units."""
        here = set(model.modules())
        return _Named(
            self.plan,
            [] if whole else [unit for unit in self.units if unit in here],
            [each for each in self.splits if each.layer in here],
            [each for each in self.roles if each.module in here],
        )


def _built(task: Task, config: Config, weights: Weights | None) -> tuple[nn.Module, Blueprint | None]:
    """The whole model on the CPU, with the weights it starts from; or on meta, with what will fill it."""
    seed_all(config.run.seed)
    if config.parallel.meta and weights is not None:
        raise UserError("parallel.meta builds without memory, and model.weights is given; set parallel.meta false")
    model, blueprint = built_on_meta(task.model) if config.parallel.meta else (task.model(), None)
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(task).__name__}.model() returned {type(model).__name__}, not a torch.nn.Module")
    model.train()  # a model that was trained before may come in evaluation mode
    if weights is not None:
        weights.fill(model)
    freeze(model, config.optim.frozen)
    return model, blueprint


def _named(model: nn.Module, plan: Plan, config: Config, mesh: Mesh, device: torch.device) -> _Named:
    if config.precision.float8:
        multiply_in_float8(plan.modules(model), device)
    splits = splits_of(model, plan, mesh.tp) if mesh.tp > 1 else []
    refuse_split_ties(model, splits)
    sequence = config.parallel.sequence and mesh.tp > 1
    setting = "parallel.sequence is on" if sequence else f"parallel.cp is {mesh.cp}"
    roles = roles_of(model, plan, setting) if sequence or mesh.cp > 1 else []
    if sequence:
        refuse_ungathered(model, splits, roles)
    return _Named(plan, plan.modules(model), splits, roles)


def _shared(model: nn.Module, plan: Plan, config: Config, mesh: Mesh) -> None:
    """Split layers and share tokens out, in place, in fp32, for which a GPU's ring has no kernels."""
    plain = config.replace(precision=config.precision.replace(float8=False))
    if mesh.devices is not None and mesh.devices.device_type == "cuda":
        plain = plain.replace(parallel=plain.parallel.replace(cp_attention="gather"))
    _spread(_named(model, plan, plain, mesh, torch.device("cpu")), config, mesh)


def _few(batch: Batch) -> Batch:
    return next(batch.split(_FEW))


def _part(
    task: Task, model: nn.Module, plan: Plan, config: Config, mesh: Mesh, device: torch.device, example: Example | None
) -> Parts:
    """Cut the model, in place, to this rank's stages."""
    if example is None:
        raise AssertionError("a pipeline is cut by an example")
    batch = example()

    def inputs(samples: int) -> tuple[Any, ...]:
        return _inputs(task, batch, samples, config, device)

    may_trace = partial(_refuse_traced, model, config, mesh)
    return part(model, plan, config.parallel, mesh.pp_rank, len(batch), inputs, may_trace)


def _inputs(task: Task, batch: Batch, samples: int, config: Config, device: torch.device) -> tuple[Any, ...]:
    """The model's arguments for so many samples, on the host; images may be decoded by the device."""
    batch = next(batch.split(samples)).to(device).to(torch.device("cpu"))
    return inputs_of(task, batch.padded(max(samples, len(batch))), config.precision)


def _refuse_traced(model: nn.Module, config: Config, mesh: Mesh) -> None:
    """A trace has taken in what modules do when they are called, so nothing can be changed about their calls."""
    wanted = {
        f"parallel.tp is {mesh.tp}": mesh.tp > 1,
        f"parallel.cp is {mesh.cp}": mesh.cp > 1,
        "precision.batch_norm is synchronised": config.precision.batch_norm == "synchronised",
        "precision.float8 is true": config.precision.float8,
        "parallel.meta is true": config.parallel.meta,
    }
    for setting, asked in wanted.items():
        if asked:
            raise UserError(
                f"{setting}, and parallel.pp cuts {type(model).__name__} by tracing, which calls none of its modules; "
                "name the modules that its forward calls one after another in Plan(chain=(...)), or leave it out"
            )


def _placed(model: nn.Module, device: torch.device, config: Config, mesh: Mesh) -> nn.Module:
    """On the device, in the memory format asked for; shards are of contiguous weights, and there inputs are enough."""
    model = model.to(device)
    if not config.precision.channels_last or mesh.is_sharded or config.parallel.engine == "deepspeed":
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _spread(named: _Named, config: Config, mesh: Mesh) -> None:
    """Split layers and share tokens out, in place."""
    sequence = config.parallel.sequence and mesh.tp > 1
    if named.splits:
        split(named.splits, mesh.tensor_axis(), sequence)
    if mesh.context is not None:
        share_context(named.roles, mesh.context, config.parallel.cp_attention)
    if sequence:
        share_sequence(named.roles, mesh.tensor_axis())


def _shard(
    model: nn.Module,
    roots: Sequence[nn.Module],
    units: Sequence[nn.Module],
    parts: Parts | None,
    config: Config,
    mesh: Mesh,
) -> None:
    for root in roots:
        here = set(root.modules())
        shard(root, self_contained(root, [unit for unit in units if unit in here]), mesh, config)
    if parts is not None and parts.traced:
        adopt(model, roots)
