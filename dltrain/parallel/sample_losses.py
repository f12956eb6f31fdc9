"""Losses of single samples while they are trained on, by key, for those who want to know which are hard."""

from __future__ import annotations

from torch import Tensor

from dltrain.data.batch import Batch

_AT_HAND = 256
"""Pieces whose losses stay on the device, so that those that are brought to the host were ready long ago."""


class SampleLosses:
    """Keeps the last loss of each sample while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._pieces: list[tuple[list[int], tuple[str, ...], Tensor]] = []
        self._found: dict[str, float] = {}

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Losses [n] of a piece of a batch; padding is left out."""
        if not self.on:
            return
        there = [place for place, position in enumerate(batch.position.tolist()) if position >= 0]
        self._pieces.append((there, batch.keys, losses.detach().clone()))
        if len(self._pieces) >= 2 * _AT_HAND:
            self._bring(_AT_HAND)

    def taken(self) -> dict[str, float]:
        """The last loss of each sample since last time, by key; waits for the device."""
        self._bring(len(self._pieces))
        found, self._found = self._found, {}
        return found

    def _bring(self, pieces: int) -> None:
        """The first so many to the host."""
        for there, keys, losses in self._pieces[:pieces]:
            values = losses.tolist()
            self._found |= {keys[place]: values[place] for place in there}
        del self._pieces[:pieces]
