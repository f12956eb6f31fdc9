"""The loss scale of fp16: small gradients would be 0 in it, so losses are multiplied before the backward pass.

The scale doubles after ``INTERVAL`` steps without overflow and is halved by one with, as torch's ``GradScaler`` does
with its defaults. Every rank has it on its device and changes it by the global gradient norm, which is not finite on
any rank when a gradient of one rank is not: ranks agree without asking each other, and nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dltrain.parallel.gradients import scale_by

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""The defaults of ``torch.amp.GradScaler``."""


class LossScale:
    """``value`` is a float32 scalar on the device; steps since the last change are an int32 one."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), INITIAL, device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: Sequence[Tensor], ranks: int = 1) -> None:
        """Divide gradients of scaled losses, in place, of which the sum over ``ranks`` is wanted and the mean is there.

        The scale is a power of two, so they lose no bit by it.
        """
        scale_by(gradients, ranks / self.value)

    def update(self, nonfinite: Tensor) -> None:
        """After a step; ``nonfinite`` (float32 scalar on the device) is 1 where its gradient norm was not finite."""
        torch._amp_update_scale_(self.value, self._growth_tracker, nonfinite, GROWTH, BACKOFF, INTERVAL)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.value, "growth_tracker": self._growth_tracker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.value.copy_(state["scale"])
        self._growth_tracker.copy_(state["growth_tracker"])
