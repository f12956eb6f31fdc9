"""Losses of single samples while they are trained on, by key, for those who want to know which are hard."""

from __future__ import annotations

from torch import Tensor

from dltrain.data.batch import Batch
from dltrain.runtime.on_the_way import OnTheWay

_UNREAD = 256
"""Pieces whose losses are not read yet, so that those that are were ready long ago."""


class SampleLosses:
    """Keeps the last loss of each sample while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._pieces: list[tuple[list[int], tuple[str, ...], OnTheWay]] = []
        self._found: dict[str, float] = {}

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Losses [n] of a piece of a batch; padding is left out."""
        if not self.on:
            return
        there = [place for place, position in enumerate(batch.position.tolist()) if position >= 0]
        self._pieces.append((there, batch.keys, OnTheWay([losses.detach().clone()], losses.device)))
        if len(self._pieces) >= 2 * _UNREAD:
            self._read(_UNREAD)

    def taken(self) -> dict[str, float]:
        """The last loss of each sample since last time, by key; waits for the device."""
        self._read(len(self._pieces))
        found, self._found = self._found, {}
        return found

    def _read(self, pieces: int) -> None:
        for there, keys, losses in self._pieces[:pieces]:
            values = losses.numbers()
            self._found |= {keys[place]: values[place] for place in there}
        del self._pieces[:pieces]
