"""PatchTST (Nie et al., "A Time Series is Worth 64 Words", ICLR 2023): patches of each channel are a transformer's
tokens, channels share all weights.

Each past is standardised by its own mean and deviation and the forecast brought back (Kim et al., "Reversible instance
normalization", ICLR 2022). Norms are layer norms, where the paper has batch norms: those would make a sample's forecast
depend on the batch, and so on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.models.transformer import TENSOR, encoder
from dltrain.parallel.plan import Plan

PLAN = Plan(units=("blocks.*",), tensor=TENSOR)

_LEAST_DEVIATION = 1e-5


class PatchTST(nn.Module):
    """Forecasts [n, horizon, channels] of pasts [n, lookback, channels], float32, in the units of the past.

    Patches of ``patch`` steps begin every ``stride`` steps; the last value is repeated for a stride at the end, as in
    the paper.
    """

    def __init__(
        self,
        lookback: int,
        horizon: int,
        *,
        patch: int = 16,
        stride: int = 8,
        depth: int = 3,
        width: int = 128,
        heads: int = 16,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if lookback < patch:
            raise ValueError(f"a lookback of {lookback} steps is shorter than a patch of {patch}")
        count = (lookback + stride - patch) // stride + 1
        self._patch, self._stride = patch, stride
        self.patches = nn.Linear(patch, width)
        self.positions = nn.Parameter(torch.empty(1, count, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = encoder(depth, width, heads, 2 * width, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(count * width, horizon)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, past: Tensor) -> Tensor:
        mean = past.mean(1, keepdim=True)
        deviation = past.std(1, keepdim=True, unbiased=False).clamp(min=_LEAST_DEVIATION)
        series = ((past - mean) / deviation).transpose(1, 2)  # [n, channels, lookback]
        padded = F.pad(series, (0, self._stride), mode="replicate")
        tokens = self.patches(padded.unfold(2, self._patch, self._stride)).flatten(0, 1) + self.positions
        tokens = self.dropout(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        future = self.head(self.norm(tokens).flatten(1)).unflatten(0, series.shape[:2])
        forecast: Tensor = future.transpose(1, 2) * deviation + mean
        return forecast
