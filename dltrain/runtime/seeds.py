"""Random state as a function of (seed, step, rank).

Every generator is set anew at the start of each step, so that nothing random has to be saved: a resumed step draws what
the uninterrupted one drew, on any number of ranks, whatever ran in between.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(key: int) -> None:
    """Set Python's, NumPy's and torch's generators from a 64-bit key."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # users' code draws from the global generator
    torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
