"""Curves of precision and recall, from counts of samples by the probability that they were given.

table = points(counts)  # counts: [2, bins], as a metric's curves() gives them
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard.summary import pr_curve_raw

Array = np.ndarray[Any, np.dtype[np.float64]]


def points(counts: Tensor) -> Array:
    """Float64 [6, bins]: true and false positives, true and false negatives, precision and recall at each threshold.

    Where nothing is above a threshold the precision is 1, as scikit-learn has it.
    """
    of_class, others = counts.numpy()
    true = np.cumsum(of_class[::-1])[::-1]
    false = np.cumsum(others[::-1])[::-1]
    found = true + false
    precision = np.where(found > 0, true / np.maximum(found, 1), 1.0)
    recall = true / max(true[0], 1)
    return np.stack([true, false, false[0] - false, true[0] - true, precision, recall])


def curve(tag: str, counts: Tensor) -> Summary:
    """For the tab of curves."""
    true, false, true_negative, false_negative, precision, recall = points(counts)
    return pr_curve_raw(  # type: ignore[no-untyped-call]
        tag, true, false, true_negative, false_negative, precision, recall, len(precision)
    )
