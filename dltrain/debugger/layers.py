"""All tensors of a kind over all steps in one array, and the same by blocks of a model that has hundreds of them.

gradients = layers_of(run.segments(), "gradients")
gradients.reduced("abs_mean")  # float64 [layers, steps], masked where a tensor was not due
gradients.grouped(40).names  # blocks.0, blocks.1, ...: at most 40
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dltrain.debugger.moments import COLUMNS, together
from dltrain.debugger.reductions import Array, reduce
from dltrain.debugger.seen import Index
from dltrain.debugger.store import Segment

Steps = np.ndarray[Any, np.dtype[np.int64]]

SMALL = 1e-12
"""Added to the size of weights that updates are measured by."""


class Layers(NamedTuple):
    """``names`` without their kind, in the model's order; int64 ``steps`` [steps]; ``moments`` float64
    [layers, steps, 9], with a count of 0 where a tensor was not due."""

    names: list[str]
    steps: Steps
    moments: Array

    def reduced(self, name: str) -> Any:
        """One reduction, a masked float64 [layers, steps]: masked where there are no statistics."""
        return np.ma.array(reduce(name, self.moments), mask=self.moments[:, :, 0] == 0)

    def grouped(self, most: int) -> Layers:
        """At most so many: tensors of one block become one, whose moments are those of all of their elements."""
        blocks = blocks_of(self.names, most)
        if blocks == self.names:
            return self
        members: dict[str, list[int]] = {}
        for place, block in enumerate(blocks):
            members.setdefault(block, []).append(place)
        moments = np.stack([together(self.moments[places]) for places in members.values()])
        return Layers(list(members), self.steps, moments)

    def of(self, names: Sequence[str]) -> Layers:
        """Those of these names, in their order."""
        places = [self.names.index(name) for name in names]
        return Layers(list(names), self.steps, self.moments[places])


def layers_of(segments: Sequence[Segment], kind: str) -> Layers:
    """What segments have of a kind; steps at which none of it was due are left out, as are tensors without elements."""
    found = [(segment, *Index(segment.names).of(kind)) for segment in segments]
    names = list(dict.fromkeys(name for _, some, _ in found for name in some))
    place_of = {name: place for place, name in enumerate(names)}
    steps = np.concatenate([np.empty(0, np.int64), *(segment.steps for segment, _, _ in found)]).astype(np.int64)
    moments = np.zeros((len(names), len(steps), len(COLUMNS)))
    start = 0
    for segment, some, places in found:
        rows = [place_of[name] for name in some]
        moments[rows, start : start + len(segment.steps)] = segment.values[:, places].swapaxes(0, 1)
        start += len(segment.steps)
    there, due = (np.flatnonzero(np.count_nonzero(moments[:, :, 0], axis=axis)) for axis in (1, 0))
    return Layers([bare(names[place]) for place in there], steps[due], moments[there][:, due])


def ratios(weights: Layers, updates: Layers) -> tuple[list[str], Steps, Any]:
    """Names, steps, and mean |update| / mean |weight|, a masked float64 [layers, steps], where both are known."""
    known = set(weights.names)
    names = [name for name in updates.names if name in known]
    steps, ours, theirs = np.intersect1d(updates.steps, weights.steps, return_indices=True)
    sizes = weights.of(names).reduced("abs_mean")[:, theirs]
    changes = updates.of(names).reduced("abs_mean")[:, ours]
    with np.errstate(invalid="ignore", over="ignore"):
        return names, steps, np.ma.array(changes.data / (sizes.data + SMALL), mask=changes.mask | sizes.mask)


def blocks_of(names: Sequence[str], most: int) -> list[str]:
    """For each name the block that it belongs to, of at most ``most``: the name itself where there are few, or as many
    of its first parts as leave few enough. Where that would leave hardly any, neighbours are put together instead."""
    deepest = max((name.count(".") + 1 for name in names), default=1)
    depths = [_first_parts(names, depth) for depth in range(deepest, 0, -1)]
    place = next((place for place, blocks in enumerate(depths) if len(set(blocks)) <= most), len(depths))
    if place < len(depths) and (place == 0 or len(set(depths[place])) * _HARDLY >= most):
        return depths[place]
    return _in_ranges(depths[place - 1], most)


_HARDLY = 4
"""Fewer than one in so many of the blocks that might be shown are hardly any."""


def _first_parts(names: Sequence[str], depth: int) -> list[str]:
    return [".".join(name.split(".")[:depth]) for name in names]


def _in_ranges(blocks: Sequence[str], most: int) -> list[str]:
    """Neighbouring blocks with the same parent together, as few as leave at most ``most``: "layers.4 to 7"."""
    parents: dict[str, list[str]] = {}
    for block in dict.fromkeys(blocks):
        parents.setdefault(block.rpartition(".")[0], []).append(block)
    width = 2
    while sum(-(-len(some) // width) for some in parents.values()) > most and width < len(blocks):
        width += 1
    title: dict[str, str] = {}
    for some in parents.values():
        for start in range(0, len(some), width):
            several = some[start : start + width]
            last = f" to {several[-1].rpartition('.')[2]}" if len(several) > 1 else ""
            title |= dict.fromkeys(several, several[0] + last)
    return [title[block] for block in blocks]


def bare(name: str) -> str:
    """Without the kind that stands before the slash."""
    return name.partition("/")[2] or name
