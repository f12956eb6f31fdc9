"""What the two loops share: the model, the batch, and every setting. Neither loop has a setting of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One model trained on one batch again and again.

    ``inputs`` (samples first) and ``targets`` (int64 classes, [n]) lie in host memory, page-locked for a GPU: every
    step copies them to the device anew. ``prepare`` turns inputs on the device into what the model takes.
    """

    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    prepare: Callable[[Tensor], Tensor]
    device: torch.device
    max_norm: float = 0.0
    bf16: bool = False
    compile: bool = False
    channels_last: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0

    def __len__(self) -> int:
        return len(self.targets)


def random_batch(shape: tuple[int, ...], classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes of ``shape`` (uint8, samples first) and as many classes (int64), in host memory, the same every time."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, classes, shape[:1], generator=generator)
    return (inputs.pin_memory(), targets.pin_memory()) if device.type == "cuda" else (inputs, targets)


def scaled(inputs: Tensor) -> Tensor:
    """Bytes as numbers from -0.5 to 0.5, float32."""
    return inputs.float() / 255 - 0.5
