"""A tensor in nine numbers that add up over its parts: over chunks, micro-batches, shards and ranks.

Six are sums, and three are largest values, of which the whole's is the largest. Means, deviations and norms follow from
them on the host (:mod:`dltrain.debugger.reductions`). They are float64; values in between are float32, and squares are
taken around the mean of each piece, so that the variance of weights near 1 is right as well.

    row = moments_of([tensor])[0]  # [9], on the tensor's device
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Floats = np.ndarray[Any, np.dtype[np.float32]]

SUMS = ("count", "sum", "squares", "absolute", "zeros", "nonfinite")
"""Added over parts; ``squares`` is the sum of squares around 0, ``absolute`` of absolute values."""

LARGEST = ("largest", "least_negated", "least_absolute_negated")
"""Largest over parts."""

COLUMNS = (*SUMS, *LARGEST)

NOTHING = (0.0,) * len(SUMS) + (-math.inf,) * len(LARGEST)
"""Of a tensor without elements: it changes nothing in a sum, nor in a largest value."""

CHUNK = 1 << 16
"""Elements that stay in a core's cache while they are looked at eight times."""

_ONES = np.ones(CHUNK, np.float32)
"""A product with them is the quickest sum, in as many parts as a core has lanes."""

_MEAN_DOMINATES = 0.9
"""Share of the squares that is the mean's, from which on they are taken anew around it."""


def moments_of(tensors: Sequence[Tensor]) -> Tensor:
    """Float64 [tensors, 9], columns as :data:`COLUMNS`, on the tensors' device, which is never waited for.

    Tensors are of any shape and floating-point or integer dtype, all on one device.
    """
    if not tensors:
        return torch.empty(0, len(COLUMNS), dtype=torch.float64)
    if tensors[0].device.type == "cpu":
        return torch.from_numpy(np.array([_on_host(_flat(tensor).numpy()) for tensor in tensors]))
    return torch.stack([_on_device(_flat(tensor)) for tensor in tensors])


def row_of(tensor: Tensor) -> Tensor:
    """Float64 [9] of one tensor, as :func:`moments_of`."""
    if tensor.device.type == "cpu":
        return torch.from_numpy(np.array(_on_host(_flat(tensor).numpy())))
    return _on_device(_flat(tensor))


def _flat(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory, where that is without gaps; float32."""
    tensor = tensor.detach()
    if not tensor.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(tensor):
        tensor = torch.as_strided(tensor, (tensor.numel(),), (1,))
    flat = tensor.reshape(-1)
    return flat if flat.dtype == torch.float32 else flat.float()


def _on_host(flat: Floats) -> tuple[float, ...]:
    """By numpy, on one core: torch would start its threads for each piece, and wait for those that others hold."""
    if 0 < len(flat) <= CHUNK:  # most tensors are one chunk, and many so small that calls are all they cost
        found, tops = _of_chunk(flat, np.empty_like(flat))
        return (*found, *tops)
    sums, largest = list(NOTHING[: len(SUMS)]), list(NOTHING[len(SUMS) :])
    scratch = np.empty(min(CHUNK, len(flat)), np.float32)
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        found, tops = _of_chunk(chunk, scratch[: len(chunk)])
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        largest = [_larger(a, b) for a, b in zip(largest, tops, strict=True)]
    return (*sums, *largest)


def _of_chunk(chunk: Floats, absolute: Floats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    count, ones = len(chunk), _ONES[: len(chunk)]
    largest, least = chunk.item(chunk.argmax()), chunk.item(chunk.argmin())
    total, squares = float(chunk.dot(ones)), float(chunk.dot(chunk))
    if least >= 0:  # what ReLUs return is its own absolute value
        magnitude, least_absolute = total, least
        zeros = 0 if least else int(np.count_nonzero(np.equal(chunk, 0)))
    else:
        np.abs(chunk, out=absolute)
        bits = absolute.view(np.int32)  # which are in the order of the values, and quicker to look at
        magnitude, least_absolute = float(absolute.dot(ones)), absolute.item(bits.argmin())
        zeros = 0 if least_absolute else count - int(np.count_nonzero(bits))
    nonfinite = 0
    if not math.isfinite(squares):
        nonfinite = count - int(np.isfinite(chunk).sum())
    elif total * total > _MEAN_DOMINATES * squares * count:
        total, magnitude, squares = _around_mean(chunk, total, absolute)
    return (count, total, squares, magnitude, zeros, nonfinite), (largest, -least, -least_absolute)


def _around_mean(chunk: Floats, total: float, scratch: Floats) -> tuple[float, float, float]:
    """Sums of values, of absolute values and of squares, by way of those around the mean: so small differences of large
    values are kept."""
    count = len(chunk)
    mean = float(np.float32(total / count))
    np.abs(chunk, out=scratch)
    np.subtract(scratch, np.float32(abs(mean)), out=scratch)
    magnitude = count * abs(mean) + float(np.dot(scratch, _ONES[:count]))
    np.subtract(chunk, np.float32(mean), out=scratch)
    rest, squares = float(np.dot(scratch, _ONES[:count])), float(np.dot(scratch, scratch))
    return count * mean + rest, magnitude, squares + 2 * mean * rest + count * mean * mean


def _larger(one: float, other: float) -> float:
    """The larger; not a number if one of them is none."""
    return one if math.isnan(one) or one > other else other


def _on_device(flat: Tensor) -> Tensor:
    if not flat.numel():
        nothing = [torch.full((), value, dtype=torch.float64, device=flat.device) for value in NOTHING]
        return torch.stack(nothing)  # filled there: a copy from the host would wait for the device
    count, absolute = flat.numel(), flat.abs()
    variance, mean = torch.var_mean(flat, correction=0)
    least, largest = torch.aminmax(flat)
    mean, variance = mean.double(), variance.double()
    values = (
        torch.full_like(mean, count),
        mean * count,
        (variance + mean * mean) * count,
        absolute.sum().double(),
        (count - torch.count_nonzero(flat)).double(),
        (count - flat.isfinite().sum()).double(),
        largest.double(),
        -least.double(),
        -absolute.amin().double(),
    )
    return torch.stack(values)


def together(rows: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """As :func:`added`, on the host; parts without elements may have any largest values."""
    largest = np.where(rows[..., :1] > 0, rows[..., len(SUMS) :], -np.inf).max(0)
    return np.concatenate([rows[..., : len(SUMS)].sum(0), largest], -1)


def added(rows: Tensor) -> Tensor:
    """Of a whole from those of its parts: float64 [parts, ..., 9] to [..., 9]."""
    sums, largest = rows[..., : len(SUMS)].sum(0), rows[..., len(SUMS) :].amax(0)
    return torch.cat([sums, largest], -1)
