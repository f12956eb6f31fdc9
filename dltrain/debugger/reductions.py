"""What people ask of a tensor, from its moments: the reductions of SageMaker Debugger, and two fractions.

reduce("abs_mean", row)  # row: float64 [..., 9], as moments_of gives it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dltrain.debugger.moments import COLUMNS
from dltrain.errors import UserError, nearest

Array = np.ndarray[Any, np.dtype[np.float64]]

_PLACE = {name: place for place, name in enumerate(COLUMNS)}


def _of(name: str) -> Callable[[Array], Array]:
    return lambda row: row[..., _PLACE[name]]


def _per_element(name: str) -> Callable[[Array], Array]:
    return lambda row: row[..., _PLACE[name]] / np.maximum(row[..., 0], 1)


def _variance(name: str) -> Callable[[Array], Array]:
    mean, square = _per_element(name), _per_element("squares")
    return lambda row: np.maximum(square(row) - mean(row) ** 2, 0)


def _root(of: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda row: np.sqrt(of(row))


REDUCTIONS: dict[str, Callable[[Array], Array]] = {
    "min": lambda row: -row[..., _PLACE["least_negated"]],
    "max": _of("largest"),
    "mean": _per_element("sum"),
    "std": _root(_variance("sum")),
    "variance": _variance("sum"),
    "sum": _of("sum"),
    "l1": _of("absolute"),
    "l2": _root(_of("squares")),
    "abs_min": lambda row: -row[..., _PLACE["least_absolute_negated"]],
    "abs_max": lambda row: np.maximum(row[..., _PLACE["largest"]], row[..., _PLACE["least_negated"]]),
    "abs_mean": _per_element("absolute"),
    "abs_std": _root(_variance("absolute")),
    "abs_variance": _variance("absolute"),
    "abs_sum": _of("absolute"),
    "fraction_zero": _per_element("zeros"),
    "fraction_nonfinite": _per_element("nonfinite"),
}
"""By name; variances are of the whole population (divided by the count, not by one less)."""


def reduce(name: str, moments: Array) -> Array:
    """The reduction of that name: float64 [..., 9] to [...]; not a number where a tensor has such values.

    Raises :class:`UserError` for a name that is none.
    """
    if name not in REDUCTIONS:
        raise UserError(f"there is no reduction {name!r}; {nearest(name, REDUCTIONS)}")
    with np.errstate(invalid="ignore"):
        return REDUCTIONS[name](moments)
