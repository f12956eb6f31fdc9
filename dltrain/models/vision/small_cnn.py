"""A small convolutional network for small images: three blocks of convolution, batch norm
and ReLU, then one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from dltrain.parallel.plan import Plan

PLAN = Plan(units=("blocks.*",), chain=("blocks.*", "head"))


class SmallCNN(nn.Module):
    """Logits [n, classes] of square images [n, channels, size, size], float32, ``size`` at least 4."""

    def __init__(self, channels: int, size: int, classes: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 2 * width)
        self.blocks = nn.Sequential(*(_block(widths[i], widths[i + 1], pool=i > 0) for i in range(3)))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * (size // 4) ** 2, classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(images))
        return logits


def _block(inputs: int, outputs: int, pool: bool) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))
