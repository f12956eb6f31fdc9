"""The vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021).

Tokens are averaged before the head rather than read from a class token (Beyer et al., "Better plain ViT baselines",
2022), so that their number stays even. Register tokens (Darcet et al., ICLR 2024) take part in attention and are left
out of the average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dltrain.models.transformer import TENSOR, TOKENS, encoder
from dltrain.parallel.plan import Plan

PLAN = Plan(units=("blocks.*",), tensor=TENSOR, tokens=TOKENS, chain=("embed", "blocks.*", "head"))


class Embedding(nn.Module):
    """Tokens [n, registers + patches, width] of images."""

    def __init__(self, size: int, patch: int, channels: int, width: int, registers: int, positions: float) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.registers = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self._deviation = positions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions, std=self._deviation)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        if self.registers is not None:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1)
        return tokens


class Head(nn.Module):
    """Logits [n, classes] of the average token; the first ``registers`` are left out."""

    def __init__(self, width: int, classes: int, registers: int) -> None:
        super().__init__()
        self._registers = registers
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(tokens[:, self._registers :]).mean(1))
        return logits


class ViT(nn.Module):
    """Logits [n, classes] of square images [n, channels, size, size], float32; ``patch`` divides ``size``.

    ``positions`` is the deviation of the position embeddings at the start.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        channels: int,
        classes: int,
        *,
        depth: int = 12,
        width: int = 192,
        heads: int = 3,
        registers: int = 0,
        dropout: float = 0.0,
        positions: float = 0.02,
    ) -> None:
        super().__init__()
        self.embed = Embedding(size, patch, channels, width, registers, positions)
        self.blocks = encoder(depth, width, heads, 4 * width, dropout)
        self.head = Head(width, classes, registers)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(tokens)
        return logits
