"""Settings that do not go together, refused before a model is built, each in one sentence."""

from __future__ import annotations

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.mesh import Mesh

_SPLITTING = ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v")
"""Schedules that compute gradients of inputs and of weights apart."""


def refuse(config: Config, mesh: Mesh) -> None:
    """Raise :class:`UserError` for the first such pair."""
    _checkpointing(config, mesh)
    _compile(config, mesh)


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


def _splits(config: Config, mesh: Mesh) -> bool:
    return mesh.pp > 1 and config.parallel.schedule in _SPLITTING
