"""Statistics of whole tensors under every layout: each rank looks at its parts, and one sum and one largest value over
all ranks make the whole of them.

    sampler = Sampler(engine, ("weights", "gradients"))
    sampler.take("gradients")  # between backward pass and step
    sampler.take("weights")
    table = sampler.send()  # collective
    table.rows()  # later: float64 [tensors, 9] on the host, in the order of sampler.names
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.debugger.moments import NOTHING, SUMS, moments_of
from dltrain.debugger.reductions import Array
from dltrain.parallel.engine import Engine
from dltrain.parallel.pieces import Piece
from dltrain.runtime.on_the_way import OnTheWay

PREFIX = {"weights": "", "gradients": "gradient/", "updates": "update/"}
"""Of a tensor's name by kind; states of the optimizer have their own name before a slash."""


def name_of(kind: str, parameter: str) -> str:
    """The name of a parameter's tensor of that kind, such as ``gradient/head.weight``."""
    return PREFIX.get(kind, f"{kind}/") + parameter


class Table:
    """Moments of all tensors at one step, on their way to the host."""

    def __init__(self, sums: Tensor, largest: Tensor) -> None:
        self._tensors = len(sums)
        self._values = OnTheWay([sums, largest], sums.device)

    def rows(self) -> Array:
        """Float64 [tensors, 9]; of a tensor with NaNs largest and least values are NaN."""
        numbers = np.array(self._values.numbers(), dtype=np.float64)
        cut = self._tensors * len(SUMS)
        rows = np.concatenate([numbers[:cut].reshape(self._tensors, -1), numbers[cut:].reshape(self._tensors, -1)], 1)
        rows[np.isnan(rows[:, 1]), len(SUMS) :] = np.nan  # what a largest value over ranks makes of NaN is open
        return rows


class Sampler:
    """Of the tensors of ``kinds`` that an engine holds; ``names`` are those of all ranks, equal on every rank.

    ``kinds`` are "weights", "gradients", "updates" (what a step adds to the weights) and states of the optimizer;
    ``others`` are names of tensors whose moments are :meth:`put`.
    Making one is collective.
    """

    def __init__(self, engine: Engine, kinds: Sequence[str], others: Iterable[str] = ()) -> None:
        self._engine, self._device = engine, engine.device
        self._trained = {name for name, parameter in engine.named_parameters() if parameter.requires_grad}
        parameters = [piece.name for piece in engine.pieces("weights")]
        mine = [
            name_of(kind, name) for kind in kinds for name in parameters if kind == "weights" or name in self._trained
        ]
        self.names = _union([*mine, *others])
        self._places = {name: place for place, name in enumerate(self.names)}
        self._found: dict[int, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._nothing = torch.tensor(NOTHING, dtype=torch.float64, device=self._device)

    def take(self, kind: str) -> None:
        """Look at what there is of a kind; gradients between backward pass and step, the others after it."""
        pieces = self._updates() if kind == "updates" else self._engine.pieces(kind)
        for piece in pieces:
            if piece.counts and piece.local.numel():
                self.put(name_of(kind, piece.name), moments_of([piece.local])[0])

    def put(self, name: str, row: Tensor) -> None:
        """A tensor's moments on this rank, [9]."""
        self._found[self._places[name]] = row

    def remember(self) -> None:
        """The weights before a step, so that its updates can be seen after it."""
        for piece in self._engine.pieces("weights"):
            if piece.counts and piece.name in self._trained:
                kept = self._before.setdefault(piece.name, torch.empty_like(piece.local))
                kept.copy_(piece.local)

    def send(self) -> Table:
        """What was taken since last time, of all ranks, on its way to the host; collective."""
        # in a list, for an index on the host would make it wait for the device
        rows = torch.stack([self._found.get(place, self._nothing) for place in range(len(self.names))])
        self._found = {}
        sums, largest = rows[:, : len(SUMS)].contiguous(), rows[:, len(SUMS) :].contiguous()
        if _ranks() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return Table(sums, largest)

    def _updates(self) -> Iterator[Piece]:
        for piece in self._engine.pieces("weights"):
            kept = self._before.get(piece.name)
            if kept is not None:
                yield Piece(piece.name, torch.sub(piece.local, kept, out=kept), True)
        if self._device.type == "cuda":  # whose memory is dear, and quick to have again; a host's is neither
            self._before = {}


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _union(names: Sequence[str]) -> list[str]:
    """The names of all ranks, in the order of the first that has them; collective."""
    everyone = [list(names)]
    if _ranks() > 1:
        everyone = [[] for _ in range(_ranks())]
        dist.all_gather_object(everyone, list(names))
    return list(dict.fromkeys(name for some in everyone for name in some))
