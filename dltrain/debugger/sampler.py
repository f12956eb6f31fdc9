"""Statistics of whole tensors under every layout: each rank looks at its parts, and one sum and one largest value over
all ranks make the whole of them.

    sampler = Sampler(engine, names_of(engine, ("weights", "gradients")))
    sampler.take("gradients")  # between backward pass and step
    sampler.take("weights")
    table = sampler.send()  # collective
    table.rows()  # later: float64 [tensors, 9] on the host, in the order of sampler.names
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dltrain.debugger.histograms import BINS, counts_of
from dltrain.debugger.moments import NOTHING, SUMS, row_of
from dltrain.debugger.reductions import Array
from dltrain.parallel.engine import Engine
from dltrain.parallel.pieces import Piece
from dltrain.runtime.on_the_way import OnTheWay

PREFIX = {"weights": "", "gradients": "gradient/", "updates": "update/"}
"""Of a tensor's name by kind; states of the optimizer have their own name before a slash."""


def name_of(kind: str, parameter: str) -> str:
    """The name of a parameter's tensor of that kind, such as ``gradient/head.weight``."""
    return PREFIX.get(kind, f"{kind}/") + parameter


def names_of(engine: Engine, kinds: Sequence[str], others: Iterable[str] = ()) -> list[str]:
    """Names of the tensors of these kinds, and others, that any rank has: equal on every rank; collective.

    ``kinds`` are "weights", "gradients", "updates" (what a step adds to the weights) and states of the optimizer.
    """
    trained = {name for name, parameter in engine.named_parameters() if parameter.requires_grad}
    parameters = [piece.name for piece in engine.pieces("weights")]
    mine = [name_of(kind, name) for kind in kinds for name in parameters if kind == "weights" or name in trained]
    return union([*mine, *others])


def union(names: Sequence[str]) -> list[str]:
    """The names of all ranks, in the order of the first that has them; collective."""
    everyone = [list(names)]
    if ranks() > 1:
        everyone = [[] for _ in range(ranks())]
        dist.all_gather_object(everyone, list(names))
    return list(dict.fromkeys(name for some in everyone for name in some))


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Table:
    """What was seen at one step, on its way to the host."""

    def __init__(self, sums: Tensor, largest: Tensor, counted: int, extra: int) -> None:
        self._sizes = [len(largest) * len(SUMS), counted * BINS, extra, largest.numel()]
        self._values = OnTheWay([sums, largest], sums.device)

    def rows(self) -> Array:
        """Float64 [tensors, 9]; of a tensor with NaNs largest and least values are NaN."""
        sums, _, _, largest = self._parts()
        tensors = len(sums) // len(SUMS)
        if not tensors:
            return np.empty((0, len(NOTHING)))
        rows = np.concatenate([sums.reshape(tensors, -1), largest.reshape(tensors, -1)], 1)
        rows[np.isnan(rows[:, 1]), len(SUMS) :] = np.nan  # what a largest value over ranks makes of NaN is open
        return rows

    def counts(self) -> Array:
        """Float64 [tensors with histograms, BINS]."""
        return self._parts()[1].reshape(-1, BINS)

    def extra(self) -> Array:
        """Float64 [n]: what was sent beside the tensors, added up over ranks."""
        return self._parts()[2]

    def _parts(self) -> list[Array]:
        return np.split(self._values.array(), np.cumsum(self._sizes)[:-1])


class Sampler:
    """Of the tensors ``names`` that an engine holds or that are put; ``counted`` of them have histograms, too."""

    def __init__(self, engine: Engine, names: Sequence[str], counted: Collection[str] = ()) -> None:
        self._engine, self._device = engine, engine.device
        self.names = list(names)
        self.counted = [name for name in names if name in counted]
        self._places = {name: place for place, name in enumerate(self.names)}
        self._due: Collection[str] = self._places
        self._found: dict[int, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._nothing = torch.tensor(NOTHING, dtype=torch.float64, device=self._device)
        self._no_counts = torch.zeros(BINS, dtype=torch.float64, device=self._device)

    def begin(self, due: Collection[str]) -> None:
        """Only these tensors are taken until the next time."""
        self._due = due

    def take(self, kind: str) -> None:
        """Look at what is due of a kind; gradients between backward pass and step, the others after it."""
        pieces = self._updates() if kind == "updates" else self._engine.pieces(kind)
        for piece in pieces:
            name = name_of(kind, piece.name)
            if piece.counts and piece.local.numel() and name in self._due and name in self._places:
                self.put(name, row_of(piece.local))
                if name in self.counted:
                    self.count(name, counts_of(piece.local))

    def put(self, name: str, row: Tensor) -> None:
        """A tensor's moments on this rank, [9]."""
        self._found[self._places[name]] = row.to(self._device, non_blocking=True)  # offloaded ones lie on the host

    def count(self, name: str, counts: Tensor) -> None:
        """How many of a tensor's values on this rank lie in each bin, float64 [BINS]."""
        self._counts[name] = counts.to(self._device, non_blocking=True)

    def remember(self) -> None:
        """The weights before a step, so that its updates can be seen after it."""
        for piece in self._engine.pieces("weights"):
            if piece.counts and name_of("updates", piece.name) in self._due:
                kept = self._before.setdefault(piece.name, torch.empty_like(piece.local))
                kept.copy_(piece.local)

    def send(self, extra: Tensor | None = None) -> Table:
        """What was taken since last time, of all ranks, on its way to the host; collective.

        ``extra`` is float64 [n] on the device, of one size on all ranks, to be added up with it.
        """
        # in a list, for an index on the host would make it wait for the device
        found = [self._found.get(place, self._nothing) for place in range(len(self.names))]
        rows = torch.stack(found) if found else torch.empty(0, len(NOTHING), dtype=torch.float64, device=self._device)
        counts = [self._counts.get(name, self._no_counts) for name in self.counted]
        self._found, self._counts = {}, {}
        sums = torch.cat([rows[:, : len(SUMS)].reshape(-1), *counts, *([] if extra is None else [extra])])
        largest = rows[:, len(SUMS) :].contiguous()
        if ranks() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return Table(sums, largest, len(counts), 0 if extra is None else len(extra))

    def _updates(self) -> Iterator[Piece]:
        for piece in self._engine.pieces("weights"):
            kept = self._before.get(piece.name)
            if kept is not None:
                change = torch.sub(piece.local, kept, out=kept)
                yield Piece(piece.name, change, True, change)
        if self._device.type == "cuda":  # whose memory is dear, and quick to have again; a host's is neither
            self._before = {}
