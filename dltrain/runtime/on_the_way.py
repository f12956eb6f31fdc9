"""Numbers of the device on their way to the host, which nobody waits for until they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class OnTheWay:
    """Scalars and vectors of the device that will be numbers on the host, once asked for."""

    __slots__ = ("_ready", "_values")

    def __init__(self, values: list[Tensor], device: torch.device) -> None:
        self._ready: torch.cuda.Event | None = None
        self._values: list[Tensor] | Tensor = values
        if device.type == "cuda":
            packed = torch.cat([value.reshape(-1).double() for value in values])
            self._values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._values.copy_(packed, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def numbers(self) -> list[float]:
        """All of them, one after another."""
        if self._ready is not None:
            self._ready.synchronize()
        if isinstance(self._values, Tensor):
            return list(self._values.tolist())
        numbers: list[float] = []
        for value in self._values:
            numbers += value.reshape(-1).tolist() if value.dim() else [value.item()]
        return numbers

    def array(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """All of them, one after another, float64."""
        if self._ready is not None:
            self._ready.synchronize()
        if isinstance(self._values, Tensor):
            return self._values.numpy()
        return torch.cat([value.reshape(-1).double() for value in self._values]).numpy()
