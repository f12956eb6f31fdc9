"""Settings that do not go together, refused before a model is built, each in one sentence."""

from __future__ import annotations

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.mesh import Mesh
from dltrain.parallel.data import is_sharded

_SPLITTING = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v")
"""Schedules that compute gradients of inputs and of weights apart."""


def refuse(config: Config, mesh: Mesh) -> None:
    """Raise :class:`UserError` for the first such pair."""
    _checkpointing(config, mesh)
    _compile(config, mesh)
    _offload(config, mesh)
    if mesh.environment.world_size > 1:  # one process alone has nobody to send to, and a recipe may say how
        _prefetch(config, mesh)
        _replicas(config, mesh)


def _checkpointing(config: Config, mesh: Mesh) -> None:
    kind = config.parallel.activation_checkpointing
    if kind == "budget" and not config.precision.compile:
        raise UserError(
            "parallel.activation_checkpointing budget is the compiler's; set precision.compile true, or take selective"
        )
    if kind in ("full", "selective") and _splits(config, mesh):
        raise UserError(
            f"parallel.schedule {config.parallel.schedule} goes backward in two parts, and with "
            f"parallel.activation_checkpointing {kind} each weight would compute its unit anew; take 1f1b or "
            "interleaved_1f1b"
        )


def _compile(config: Config, mesh: Mesh) -> None:
    if config.precision.compile and _splits(config, mesh):
        raise UserError(
            f"parallel.schedule {config.parallel.schedule} goes backward in two parts, and a compiled stage in one; "
            "take 1f1b or interleaved_1f1b, or set precision.compile false"
        )


def _offload(config: Config, mesh: Mesh) -> None:
    if config.parallel.offload and not is_sharded(mesh):
        raise UserError(
            "parallel.offload moves what FSDP2 shards, and this layout shards nothing; set parallel.dp_shard over more "
            "than one rank, or parallel.offload false"
        )


def _prefetch(config: Config, mesh: Mesh) -> None:
    if config.parallel.prefetch and not is_sharded(mesh):
        raise UserError(
            f"parallel.prefetch is {config.parallel.prefetch}, and no parameter is sharded that could be gathered "
            "ahead; set parallel.dp_shard, or parallel.prefetch 0"
        )


def _replicas(config: Config, mesh: Mesh) -> None:
    parallel = config.parallel
    for name, value, usual in (("compress", parallel.compress, "none"), ("bucket_mib", parallel.bucket_mib, 0)):
        if value != usual and (is_sharded(mesh) or mesh.data_ranks == 1):
            raise UserError(
                f"parallel.{name} is {value}, which is DDP's, and this layout has no replicas by DDP; set "
                f"parallel.{name} {usual}, or parallel.dp_shard, tp and pp 1"
            )
    if parallel.compress == "bf16" and mesh.devices is not None and mesh.devices.device_type == "cpu":
        raise UserError(
            "parallel.compress is bf16, which torch promises for NCCL alone, and these ranks are on CPUs; take fp16"
        )
    if parallel.compress == "powersgd" and config.run.nonfinite == "skip":
        raise UserError(
            "parallel.compress is powersgd and run.nonfinite skip: what PowerSGD adds to the next gradient would never "
            "be finite again; set run.nonfinite stop"
        )


def _splits(config: Config, mesh: Mesh) -> bool:
    return mesh.pp > 1 and config.parallel.schedule in _SPLITTING
