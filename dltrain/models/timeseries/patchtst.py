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

from dltrain.models.timeseries.instance_norm import statistics
from dltrain.models.transformer import TENSOR, TOKENS, encoder
from dltrain.parallel.plan import Plan

PLAN = Plan(
    units=("blocks.*",), tensor=TENSOR, tokens=TOKENS, chain=("embed", "blocks.*", "head"), with_inputs=("head",)
)


class Embedding(nn.Module):
    """Tokens [n x channels, patches, width] of pasts [n, lookback, channels], each standardised."""

    def __init__(self, lookback: int, patch: int, stride: int, width: int, dropout: float) -> None:
        super().__init__()
        self._patch, self._stride = patch, stride
        self.patches = nn.Linear(patch, width)
        self.positions = nn.Parameter(torch.empty(1, patches_of(lookback, patch, stride), width))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, past: Tensor) -> Tensor:
        mean, deviation = statistics(past)
        series = ((past - mean) / deviation).transpose(1, 2)  # [n, channels, lookback]
        padded = F.pad(series, (0, self._stride), mode="replicate")
        tokens = self.patches(padded.unfold(2, self._patch, self._stride)).flatten(0, 1) + self.positions
        dropped: Tensor = self.dropout(tokens)
        return dropped


class Head(nn.Module):
    """Forecasts [n, horizon, channels] in the units of the past, which it is given beside the tokens."""

    def __init__(self, patches: int, width: int, horizon: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(patches * width, horizon)

    def forward(self, tokens: Tensor, past: Tensor) -> Tensor:
        mean, deviation = statistics(past)
        future = self.out(self.norm(tokens).flatten(1)).unflatten(0, (len(past), past.shape[2]))
        forecast: Tensor = future.transpose(1, 2) * deviation + mean
        return forecast


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
        self.embed = Embedding(lookback, patch, stride, width, dropout)
        self.blocks = encoder(depth, width, heads, 2 * width, dropout)
        self.head = Head(patches_of(lookback, patch, stride), width, horizon)

    def forward(self, past: Tensor) -> Tensor:
        tokens = self.embed(past)
        for block in self.blocks:
            tokens = block(tokens)
        forecast: Tensor = self.head(tokens, past)
        return forecast


def patches_of(lookback: int, patch: int, stride: int) -> int:
    """How many patches there are, the one that repeats the last value among them."""
    return (lookback + stride - patch) // stride + 1
