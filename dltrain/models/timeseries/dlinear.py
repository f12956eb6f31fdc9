"""DLinear (Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023).

The past is split into a moving average and the rest; each is mapped to the future by one linear layer shared by all
channels. The last value is taken off first and put back at the end, as in the paper's NLinear, so that a trend that
carries the series beyond what was seen does no harm.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.parallel.plan import Plan

PLAN = Plan(units=("trend", "rest"))


class DLinear(nn.Module):
    """Forecasts [n, horizon, channels] of pasts [n, lookback, channels], float32, in the units of the past."""

    def __init__(self, lookback: int, horizon: int, kernel: int = 25) -> None:
        super().__init__()
        self._kernel = kernel
        self.trend = nn.Linear(lookback, horizon)
        self.rest = nn.Linear(lookback, horizon)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / lookback)  # the paper's start: the mean of the past
            nn.init.zeros_(layer.bias)

    def forward(self, past: Tensor) -> Tensor:
        last = past[:, -1:]
        series = (past - last).transpose(1, 2)  # [n, channels, lookback]
        trend = self._moving_average(series)
        future = self.trend(trend) + self.rest(series - trend)
        forecast: Tensor = future.transpose(1, 2) + last
        return forecast

    def _moving_average(self, series: Tensor) -> Tensor:
        """Mean over ``kernel`` steps, ends repeated so that the length stays."""
        left = (self._kernel - 1) // 2
        padded = F.pad(series, (left, self._kernel - 1 - left), mode="replicate")
        return F.avg_pool1d(padded, self._kernel, stride=1)
