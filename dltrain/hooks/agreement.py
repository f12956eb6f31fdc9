"""Ends a run whose ranks have drifted apart, on request: ``run.check_every 100st``."""

from __future__ import annotations

from dltrain.errors import UserError
from dltrain.hooks.base import Hook, View


class CheckAgreement(Hook):
    """Before the first step and after every ``every`` steps; on all ranks. Raises :class:`UserError`."""

    def __init__(self, every: int) -> None:
        self._every = every

    def fit_start(self, trainer: View) -> None:
        self._check(trainer, "before the first step")

    def step_end(self, trainer: View) -> None:
        if trainer.step % self._every == 0:
            self._check(trainer, f"after step {trainer.step}")

    def _check(self, trainer: View, when: str) -> None:
        fault = trainer.engine.fault()
        if fault:
            raise UserError(
                f"{when}, {fault}; go on from an earlier checkpoint, and look at those ranks' memory and network, or "
                "for code that changes weights on some ranks alone"
            )
