"""Values counted in bins that are the same for every tensor, step and rank, so that histograms are added as they are.

A bin is a sign, a power of two and a quarter of what lies between that power and the next: the first bits of a float32.
So no range has to be known before, and a quantile is off by at most a bin's width, a quarter of its value. Values
beyond :data:`LEAST` and :data:`MOST` are counted in the outermost bins.

    counts = counts_of(tensor)  # float64 [BINS], on the tensor's device
    quantile(counts, 0.95)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dltrain.debugger.moments import CHUNK
from dltrain.debugger.reductions import Array

_QUARTERS = 4
_FIRST, _LAST = -40, 24
"""Powers of two that have bins."""

LEAST, MOST = 2.0**_FIRST, 2.0**_LAST
"""Sizes from 9e-13 to 1.7e7 have bins of their own; what is smaller, and 0, share one."""

_SIZES = (_LAST - _FIRST) * _QUARTERS
BINS = 2 * _SIZES + 1

_AT_ONCE = 1 << 24
"""Elements on a GPU, for each takes 28 bytes more while it is counted."""

_SHIFT = 21
"""Bits of a float32's mantissa that do not matter."""
_OFFSET = ((_FIRST + 127) << 2) - 1
"""Of the first bin in a float32's remaining bits: exponents are stored with 127 added."""


def _edges() -> Array:
    powers = 2.0 ** np.arange(_FIRST, _LAST)
    sizes = np.append((powers[:, None] * (1 + np.arange(_QUARTERS) / _QUARTERS)).reshape(-1), MOST)
    return np.concatenate([-sizes[::-1], sizes])


EDGES = _edges()
"""Float64 [BINS + 1], ascending: negative values, those around 0, positive values."""


@torch.no_grad()
def counts_of(tensor: Tensor) -> Tensor:
    """How many values lie in each bin: float64 [BINS] on the tensor's device, which is never waited for.

    What is not a number is not counted; infinite values are, in the outermost bins.
    """
    flat = tensor.detach().reshape(-1).float()
    if flat.device.type == "cpu":
        return torch.from_numpy(_on_host(flat.numpy()))
    counts = torch.zeros(BINS, dtype=torch.int64, device=flat.device)
    for part in torch.split(flat, _AT_ONCE):
        place = (((part.view(torch.int32) & 0x7FFFFFFF) >> _SHIFT) - _OFFSET).clamp(0, _SIZES)
        place = torch.where(part < 0, _SIZES - place, _SIZES + place)
        counts.scatter_add_(0, place.long(), (part == part).long())  # in whole numbers, which have no order of adding
    return counts.double()


def _on_host(flat: np.ndarray[Any, np.dtype[np.float32]]) -> Array:
    """By the first bits as they are, chunk by chunk; what they mean is sorted out among 2048 sums."""
    first = np.zeros(2 << 10)
    for start in range(0, len(flat), CHUNK):
        bits = flat[start : start + CHUNK].view(np.uint32) >> np.uint32(_SHIFT)
        first += np.bincount(bits, minlength=2 << 10)
    first[(0xFF << 2) + 1 : 1 << 10] = first[(1 << 10) + (0xFF << 2) + 1 :] = 0.0  # not a number
    places = np.clip(np.arange(1 << 10) - _OFFSET, 0, _SIZES)
    counts = np.zeros(BINS)
    np.add.at(counts, _SIZES + places, first[: 1 << 10])
    np.add.at(counts, _SIZES - places, first[1 << 10 :])
    return counts


def quantile(counts: Array, share: float) -> float:
    """The value below which that share of a tensor lies, within a bin's width; not a number where nothing was counted.

    ``counts`` is float64 [BINS]; ``share`` is from 0 to 1.
    """
    total = counts.sum()
    if not total:
        return float("nan")
    sums = np.cumsum(counts)
    place = min(int(np.searchsorted(sums, share * total)), BINS - 1)
    before = sums[place] - counts[place]
    part = (share * total - before) / counts[place] if counts[place] else 0.0
    return float(EDGES[place] + min(max(part, 0.0), 1.0) * (EDGES[place + 1] - EDGES[place]))


def trimmed(counts: Array) -> tuple[Array, Array]:
    """Edges and counts of the bins from the first to the last that has any, for pictures."""
    there = np.flatnonzero(counts)
    if not len(there):
        return EDGES[:2], counts[:1]
    return EDGES[there[0] : there[-1] + 2], counts[there[0] : there[-1] + 1]
