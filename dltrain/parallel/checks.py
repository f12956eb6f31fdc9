"""Every check of a layout that needs no model, in one place and without torch: before a rank starts or a model is made.

What needs the model (heads against ``parallel.tp``, its depth against the stages) follows right after it is built, in
``apply.py``.

    check_layout(config, Environment.read())
"""

from __future__ import annotations

from dltrain.config import Config
from dltrain.config.tree import AUTO
from dltrain.degrees import Degrees, degrees_of, nearest_legal
from dltrain.errors import UserError
from dltrain.parallel.pipeline.schedule import check_schedule, micro_batches, stages_per_rank
from dltrain.runtime.environment import Environment

SPLITTING = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v")
"""Schedules whose backward passes come in two parts."""


def check_layout(config: Config, environment: Environment, batch: bool = True) -> Degrees:
    """The degrees of the layout, once all is well with it; without ``batch`` no training batch is looked at.

    Raises :class:`UserError` for degrees that do not fit the world, a batch too small for them, and a pipeline whose
    schedule does not fit its stages, its micro-batches, or compilation.
    """
    degrees = degrees_of(config.parallel, environment)
    if config.parallel.micro_batch == AUTO and max(degrees.dp_shard, degrees.cp, degrees.tp, degrees.pp) > 1:
        raise UserError(
            "parallel.micro_batch is auto, which is tried by passes that may fail on one rank alone, while with "
            "parallel.dp_shard, cp, tp or pp the others would wait in it for that rank; give a number, or train with "
            "replicas alone"
        )
    if config.parallel.sequence and degrees.tp == 1:
        raise UserError(
            "parallel.sequence is on and parallel.tp is 1: it shares tokens out over the ranks of split layers; give "
            "parallel.tp, or parallel.cp instead"
        )
    if config.parallel.engine == "deepspeed":
        _check_deepspeed(config)
    if degrees.pp > 1:
        _check_compilation(config)
    if batch:
        _check_batch(config, environment, degrees)
        if degrees.pp > 1:
            _check_pieces(config, degrees)
    return degrees


def _check_deepspeed(config: Config) -> None:
    """What is made on the shards of our own engines alone."""
    asked = {
        "optim.ema": config.optim.ema,
        "run.check_every": config.run.check_every,
        "precision.compute fp16": config.precision.compute == "fp16",
        "parallel.micro_batch auto": config.parallel.micro_batch == AUTO,
    }
    for name, value in asked.items():
        if value:
            raise UserError(f"{name} does not go with parallel.engine deepspeed; leave it out, or take engine plain")


def _check_batch(config: Config, environment: Environment, degrees: Degrees) -> None:
    samples = config.data.global_batch_size
    if samples < degrees.data_ranks:
        near = nearest_legal(config.parallel, environment, lambda each: each.data_ranks <= samples)
        raise UserError(
            f"data.global_batch_size is {samples}, smaller than the {degrees.data_ranks} data ranks; give at least "
            f"{degrees.data_ranks}, train on fewer ranks, or take {near}"
        )


def _check_compilation(config: Config) -> None:
    parallel = config.parallel
    if config.precision.compile and parallel.schedule in SPLITTING:
        raise UserError(
            f"parallel.schedule {parallel.schedule} takes backward passes apart, which compiled stages do not allow; "
            "take 1f1b or interleaved_1f1b, or set precision.compile false"
        )


def _check_pieces(config: Config, degrees: Degrees) -> None:
    """The schedule against stages and micro-batches, of the largest share of a batch that a rank has."""
    parallel = config.parallel
    per_rank = parallel.stages_per_rank or stages_per_rank(parallel.schedule)
    samples = -(-config.data.global_batch_size // degrees.data_ranks)
    pieces, _ = micro_batches(samples, parallel.micro_batch, degrees.pp * per_rank, degrees.pp)
    check_schedule(parallel.schedule, degrees.pp, pieces, per_rank)
