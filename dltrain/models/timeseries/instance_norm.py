"""What standardises each past by itself (Kim et al., "Reversible instance normalization", ICLR 2022)."""

from __future__ import annotations

from torch import Tensor

_LEAST_DEVIATION = 1e-5


def statistics(past: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of pasts [n, steps, channels], [n, 1, channels]."""
    deviation = past.std(1, keepdim=True, unbiased=False).clamp(min=_LEAST_DEVIATION)
    return past.mean(1, keepdim=True), deviation
