"""TSMixer (Chen et al., "TSMixer: An All-MLP Architecture for Time Series Forecasting", TMLR 2023): MLPs that mix steps
and MLPs that mix channels, in turn.

Each past is standardised by itself and the forecast brought back. Steps are mixed by two layers, as in MLP-Mixer
(Tolstikhin et al., NeurIPS 2021), where the paper has one: a pair can be split over ranks. Norms are layer norms over
steps and channels, the paper's other choice beside batch norm, which would make a forecast depend on the batch.
"""

from __future__ import annotations

from torch import Tensor, nn

from dltrain.models.timeseries.instance_norm import statistics
from dltrain.models.transformer import MLP
from dltrain.parallel.plan import Plan

PLAN = Plan(
    units=("blocks.*",),
    tensor={
        "blocks.*.steps.up": "column",
        "blocks.*.steps.down": "row",
        "blocks.*.channels.up": "column",
        "blocks.*.channels.down": "row",
    },
    chain=("scale", "blocks.*", "head"),
    with_inputs=("head",),
)


class Scale(nn.Module):
    """Pasts [n, lookback, channels], each standardised."""

    def forward(self, past: Tensor) -> Tensor:
        mean, deviation = statistics(past)
        return (past - mean) / deviation


class Block(nn.Module):
    """Steps mixed within each channel, then channels within each step; both behind a norm and beside a residual
    connection. Keeps the shape [n, lookback, channels]."""

    def __init__(self, lookback: int, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.steps_norm = nn.LayerNorm((lookback, channels))
        self.steps = MLP(lookback, width, dropout)
        self.channels_norm = nn.LayerNorm((lookback, channels))
        self.channels = MLP(channels, width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, series: Tensor) -> Tensor:
        by_channel = self.steps_norm(series).transpose(1, 2)
        series = series + self.dropout(self.steps(by_channel)).transpose(1, 2)
        mixed: Tensor = series + self.dropout(self.channels(self.channels_norm(series)))
        return mixed


class Head(nn.Module):
    """Forecasts [n, horizon, channels] in the units of the past, which it is given beside the mixed series."""

    def __init__(self, lookback: int, horizon: int) -> None:
        super().__init__()
        self.out = nn.Linear(lookback, horizon)

    def forward(self, series: Tensor, past: Tensor) -> Tensor:
        mean, deviation = statistics(past)
        forecast: Tensor = self.out(series.transpose(1, 2)).transpose(1, 2) * deviation + mean
        return forecast


class Mixer(nn.Module):
    """Forecasts [n, horizon, channels] of pasts [n, lookback, channels], float32, in the units of the past.

    ``width`` is that of the MLPs' hidden layers.
    """

    def __init__(
        self, lookback: int, horizon: int, channels: int = 1, *, depth: int = 2, width: int = 64, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.scale = Scale()
        self.blocks = nn.ModuleList(Block(lookback, channels, width, dropout) for _ in range(depth))
        self.head = Head(lookback, horizon)

    def forward(self, past: Tensor) -> Tensor:
        series = self.scale(past)
        for block in self.blocks:
            series = block(series)
        forecast: Tensor = self.head(series, past)
        return forecast
