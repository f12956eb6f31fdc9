"""What the debugger sees of tensors, as charts that a person can take in: one number of each tensor, or of each module
where there are too many; and histograms from counts.

    for tag, value in scalars(tensors): ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import histogram_raw

from dltrain.debugger.layers import SMALL, bare, blocks_of
from dltrain.debugger.moments import COLUMNS, together
from dltrain.debugger.reductions import reduce
from dltrain.debugger.seen import Tensors, kind_of

Array = np.ndarray[Any, np.dtype[np.float64]]
Counted = tuple[Array, Array, Array]
"""Edges [bins + 1], counts [bins], and moments [9]."""

MOST = 64
"""Lines of a chart."""

_REDUCTIONS = {"weights": "l2", "activations": "std", "active": "mean", "unsaturated": "mean"}
"""What is shown of a kind; of all others the mean absolute value."""

_FIRST = re.compile("_(in|out)put_0$")
"""Ends the name of what a module takes in or returns, mostly the only one."""

_LEAST, _LARGEST = COLUMNS.index("least_negated"), COLUMNS.index("largest")


def scalars(tensors: Tensors) -> Iterator[tuple[str, float]]:
    """Tags and values: ``tensors_<kind>_<reduction>/<layer>``, ``tensors_update_ratio/<layer>`` (the mean size of
    what a step adds to the weights beside theirs, as rules have it), and ``tensors_nonfinite/<kind>``, how many values
    are not finite."""
    for kind in tensors.index.kinds:
        names, rows = _of(tensors, kind)
        yield f"tensors_nonfinite/{kind}", float(rows[:, COLUMNS.index("nonfinite")].sum())
        if kind != "updates":
            reduction = _REDUCTIONS.get(kind, "abs_mean")
            for layer, row in by_layer(names, rows).items():
                yield f"tensors_{kind}_{reduction}/{layer}", float(reduce(reduction, row))
    yield from _ratios(tensors)


def histogram(name: str, counted: Counted) -> Summary:
    """Of a tensor by its name, under ``tensors_<kind>/<tensor>``."""
    edges, counts, moments = counted
    filled = np.flatnonzero(counts)
    first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, 0)  # most bins are empty
    least, largest = -float(moments[_LEAST]), float(moments[_LARGEST])
    if not np.isfinite([least, largest]).all():  # bins have the numbers alone
        least, largest = float(edges[first]), float(edges[last])
    number, total, squares = (float(each) for each in moments[:3])
    limits, inside = edges[first + 1 : last + 1].tolist(), counts[first:last].tolist()
    tag = f"tensors_{kind_of(name)}/{_bare(name)}"
    return histogram_raw(tag, least, largest, number, total, squares, limits, inside)  # type: ignore[no-untyped-call]


def by_layer(names: Sequence[str], rows: Array) -> dict[str, Array]:
    """Moments [9] by tensor, or by block, as :func:`~dltrain.debugger.layers.blocks_of` has them."""
    groups: dict[str, list[int]] = {}
    for place, block in enumerate(_blocks(tuple(names))):
        groups.setdefault(block, []).append(place)
    return {name: together(rows[places]) for name, places in groups.items()}


@cache
def _blocks(names: tuple[str, ...]) -> list[str]:
    return blocks_of(names, MOST)


def _of(tensors: Tensors, kind: str) -> tuple[list[str], Array]:
    """Bare names and moments of tensors that have elements."""
    names, places = tensors.index.of(kind)
    rows = tensors.rows[places]
    there = rows[:, 0] > 0
    return [_bare(name) for name, is_there in zip(names, there, strict=True) if is_there], rows[there]


def _ratios(tensors: Tensors) -> Iterator[tuple[str, float]]:
    updated, updates = _of(tensors, "updates")
    weights = dict(zip(*_of(tensors, "weights"), strict=True))
    there = [place for place, name in enumerate(updated) if name in weights]
    names = [updated[place] for place in there]
    if not names:
        return
    beside = by_layer(names, np.stack([weights[name] for name in names]))
    for layer, row in by_layer(names, updates[there]).items():
        size = float(reduce("abs_mean", beside[layer])) + SMALL
        yield f"tensors_update_ratio/{layer}", float(reduce("abs_mean", row)) / size


def _bare(name: str) -> str:
    """The parameter's or module's name."""
    return _FIRST.sub("", bare(name))
