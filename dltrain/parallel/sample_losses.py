"""Losses of single samples while they are trained on, by key, for those who want to know which are hard."""

from __future__ import annotations

from torch import Tensor

from dltrain.data.batch import Batch


class SampleLosses:
    """Keeps them while it is ``on``, on the device; nothing waits for it."""

    def __init__(self) -> None:
        self.on = False
        self._found: list[tuple[list[int], tuple[str, ...], Tensor]] = []

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Losses [n] of a piece of a batch; padding is left out."""
        if self.on:
            there = [place for place, position in enumerate(batch.position.tolist()) if position >= 0]
            self._found.append((there, batch.keys, losses.detach().clone()))

    def taken(self) -> dict[str, float]:
        """The last loss of each sample since last time, by key; waits for the device."""
        found, self._found = self._found, []
        return {
            keys[place]: values[place]
            for there, keys, losses in found
            for values in [losses.tolist()]
            for place in there
        }
