"""When Python collects garbage: at the same steps on every rank, so that no rank waits for another's collection.

Collections come by themselves at any allocation, and on each rank at another step; a step takes as long as its slowest
rank. What is there when training starts lives on, and is left out.
"""

from __future__ import annotations

import gc

from dltrain.hooks.base import Hook, View


class Collection(Hook):
    """Collects garbage after every ``every`` steps, and never otherwise, until the run ends, however it ends."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._frozen = self._was_on = False

    def fit_start(self, trainer: View) -> None:
        gc.collect()
        gc.freeze()
        self._frozen, self._was_on = True, gc.isenabled()
        gc.disable()

    def step_end(self, trainer: View) -> None:
        if trainer.step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        if self._frozen:
            gc.unfreeze()
        if self._was_on:
            gc.enable()
        self._frozen = self._was_on = False
