"""Every check of a layout that needs no model, in one place and without torch: before a rank starts or a model is made.

What needs the model (heads against ``parallel.tp``, its depth against the stages) follows right after it is built, in
``apply.py``; what needs the device (bf16 gradients by gloo), where it is used.

    check_layout(config, Environment.read())
"""

from __future__ import annotations

from collections.abc import Iterable

from dltrain.config import Config, Parallel
from dltrain.config.tree import AUTO
from dltrain.degrees import Degrees, degrees_of, nearest_legal
from dltrain.errors import UserError
from dltrain.parallel.pipeline.schedule import check_schedule, micro_batches, stages_per_rank
from dltrain.runtime.environment import Environment

_NO_LAYOUT = ("parallel.micro_batch", "parallel.timeout")

SPLITTING = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v")
"""Schedules whose backward passes come in two parts."""


def check_layout(config: Config, environment: Environment, batch: bool = True) -> Degrees:
    """The degrees of the layout, once all is well with it; without ``batch`` no training batch is looked at.

    Raises :class:`UserError` for degrees that do not fit the world, settings that do not go with each other or with the
    layout, a batch too small for it, and a pipeline whose schedule does not fit its stages or its micro-batches.
    """
    degrees = degrees_of(config.parallel, environment)
    _check_tokens(config, degrees)
    if config.parallel.engine == "deepspeed":
        _check_deepspeed(config)
    _check_passes(config, degrees)
    _check_shards(config, degrees, environment.world_size)
    if environment.world_size > 1:  # one process alone has nobody to send to, and a recipe may say how
        _check_replicas(config, degrees)
    if batch:
        _check_batch(config, environment, degrees)
        if degrees.pp > 1:
            _check_pieces(config, degrees)
    return degrees


def layout_for_scoring(config: Config, environment: Environment, given: Iterable[str]) -> tuple[Config, str]:
    """A run's config on other ranks than it was trained on: in the default layout where its own does not fit them, with
    the sentence that says so, else as it is.

    Raises :class:`UserError` as :func:`check_layout` does where the layout is of settings ``given`` now.
    """
    try:
        check_layout(config, environment, batch=False)
    except UserError as error:
        if any(name.startswith("parallel.") and name not in _NO_LAYOUT for name in given):
            raise
        size, timeout = config.parallel.micro_batch, config.parallel.timeout
        usual = config.replace(
            parallel=Parallel(micro_batch=size, timeout=timeout), precision=config.precision.replace(reduce="fp32")
        )
        check_layout(usual, environment, batch=False)
        reason = str(error).partition(";")[0]
        return usual, f"scored under the default layout, for the run's does not fit: {reason}"
    return config, ""


def _check_tokens(config: Config, degrees: Degrees) -> None:
    if config.parallel.sequence and degrees.tp == 1:
        raise UserError(
            "parallel.sequence is on and parallel.tp is 1: it shares tokens out over the ranks of split layers; give "
            "parallel.tp, or parallel.cp instead"
        )


def _check_deepspeed(config: Config) -> None:
    """What is made on the shards of our own engines alone."""
    asked = {
        "optim.ema": config.optim.ema,
        "run.check_every": config.run.check_every,
        "precision.float8": config.precision.float8,
        "precision.compute fp16": config.precision.compute == "fp16",
        "parallel.micro_batch auto": config.parallel.micro_batch == AUTO,
    }
    for name, value in asked.items():
        if value:
            raise UserError(f"{name} does not go with parallel.engine deepspeed; leave it out, or take engine plain")


def _check_passes(config: Config, degrees: Degrees) -> None:
    """How a batch goes forward and backward: in micro-batches, compiled, with activations computed again."""
    parallel, again = config.parallel, config.parallel.activation_checkpointing
    if parallel.micro_batch == AUTO and degrees.pp > 1:
        raise UserError(
            "parallel.micro_batch is auto, and in a pipeline it also says in how many micro-batches stages take turns; "
            "give a number, or 0 for what its schedule wants"
        )
    if parallel.meta and config.precision.float8:
        raise UserError(
            "parallel.meta fills the layers that were built, and precision.float8 puts others in their place; set one "
            "of the two false"
        )
    if again == "budget" and not config.precision.compile:
        raise UserError(
            "parallel.activation_checkpointing budget is the compiler's; set precision.compile true, or take selective"
        )
    if degrees.pp == 1 or parallel.schedule not in SPLITTING:
        return
    if config.precision.compile:
        raise UserError(
            f"parallel.schedule {parallel.schedule} goes backward in two parts, and a compiled stage in one; "
            "take 1f1b or interleaved_1f1b, or set precision.compile false"
        )
    if again in ("full", "selective"):
        raise UserError(
            f"parallel.schedule {parallel.schedule} goes backward in two parts, and with "
            f"parallel.activation_checkpointing {again} each weight would compute its unit anew; take 1f1b or "
            "interleaved_1f1b"
        )


def _check_shards(config: Config, degrees: Degrees, world: int) -> None:
    """What is FSDP2's."""
    if degrees.is_sharded:
        return
    if config.parallel.offload:
        raise UserError(
            "parallel.offload moves what FSDP2 shards, and this layout shards nothing; set parallel.dp_shard over more "
            "than one rank, or parallel.offload false"
        )
    if config.precision.reduce != "fp32" and world > 1:
        raise UserError(
            f"precision.reduce is {config.precision.reduce}, which is FSDP2's, and this layout shards nothing; set "
            "parallel.dp_shard, or with replicas alone parallel.compress"
        )
    if config.parallel.prefetch and world > 1:
        raise UserError(
            f"parallel.prefetch is {config.parallel.prefetch}, and no parameter is sharded that could be gathered "
            "ahead; set parallel.dp_shard, or parallel.prefetch 0"
        )


def _check_replicas(config: Config, degrees: Degrees) -> None:
    """What is DDP's."""
    parallel = config.parallel
    for name, value, usual in (("compress", parallel.compress, "none"), ("bucket_mib", parallel.bucket_mib, 0)):
        if value != usual and (degrees.is_sharded or degrees.data_ranks == 1):
            raise UserError(
                f"parallel.{name} is {value}, which is DDP's, and this layout has no replicas by DDP; set "
                f"parallel.{name} {usual}, or parallel.dp_shard, tp and pp 1"
            )
    if parallel.compress == "powersgd" and config.run.nonfinite == "skip":
        raise UserError(
            "parallel.compress is powersgd and run.nonfinite skip: what PowerSGD adds to the next gradient would never "
            "be finite again; set run.nonfinite stop"
        )


def _check_batch(config: Config, environment: Environment, degrees: Degrees) -> None:
    samples = config.data.global_batch_size
    if samples < degrees.data_ranks:
        near = nearest_legal(config.parallel, environment, lambda each: each.data_ranks <= samples)
        raise UserError(
            f"data.global_batch_size is {samples}, smaller than the {degrees.data_ranks} data ranks; give at least "
            f"{degrees.data_ranks}, train on fewer ranks, or take {near}"
        )


def _check_pieces(config: Config, degrees: Degrees) -> None:
    """The schedule against stages and micro-batches, of the largest share of a batch that a rank has."""
    parallel = config.parallel
    per_rank = parallel.stages_per_rank or stages_per_rank(parallel.schedule)
    samples = -(-config.data.global_batch_size // degrees.data_ranks)
    pieces, _ = micro_batches(samples, parallel.micro_batch, degrees.pp * per_rank, degrees.pp)
    check_schedule(parallel.schedule, degrees.pp, pieces, per_rank)
