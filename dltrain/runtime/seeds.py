"""Random state as a function of (seed, step, rank).

Every generator is set anew at the start of each step, so that nothing random has to be saved: a resumed step draws what
the uninterrupted one drew, on any number of ranks, whatever ran in between.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(key: int, device: torch.device | None = None) -> None:
    """Set Python's, NumPy's and torch's generators from a 64-bit key; of the GPUs, only ``device``'s.

    Sets generators themselves: ``torch.manual_seed`` goes through every kind of device and takes 80 microseconds.
    """
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # users' code draws from the global generator
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key & 0x7FFFFFFFFFFFFFFF)
