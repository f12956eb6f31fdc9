"""On which steps statistics are taken, and of which tensors."""

from __future__ import annotations

from dataclasses import dataclass

from dltrain.config import Config, Debugger
from dltrain.errors import UserError, nearest

_OF_THE_MODEL = ("weights", "gradients", "updates", "activations")
_OF_OPTIMIZERS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def kinds_of(config: Config) -> tuple[str, ...]:
    """The kinds of tensors to look at. Raises :class:`UserError` for one that is not there."""
    known = (*_OF_THE_MODEL, *_OF_OPTIMIZERS[config.optim.name])
    for kind in config.debugger.collect:
        if kind not in known:
            raise UserError(f"debugger.collect names {kind!r}, which there is not; {nearest(kind, known)}")
        if kind == "updates" and config.parallel.engine == "deepspeed" and config.parallel.deepspeed.stage:
            raise UserError(
                "debugger.collect names updates, and DeepSpeed's ZeRO has no weights before a step; leave it out"
            )
    return config.debugger.collect


@dataclass(frozen=True)
class Policy:
    """The first step and every multiple of ``every`` in [start, end), 0 for no end; or ``steps`` alone, if given."""

    every: int
    start: int = 0
    end: int = 0
    steps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, settings: Debugger) -> Policy:
        """As the config says."""
        return cls(int(settings.every.value), settings.start, settings.end, frozenset(settings.steps))

    def due(self, step: int) -> bool:
        """Whether they are on this step, counted from 1."""
        if self.steps:
            return step in self.steps
        if step < self.start or (self.end and step >= self.end):
            return False
        return step % self.every == 0 or step == max(1, self.start)
