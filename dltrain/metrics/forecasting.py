"""Forecasting: scaled and plain errors as sums, always beside the seasonal naive forecast of the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain.data.batch import Batch
from dltrain.metrics.base import Scores, worst

KEPT = 6


class Forecasting:
    """Scores of point forecasts [n, horizon, channels] against the end of ``batch.fields["values"]``.

    Values are in the data's own units. ``mase`` (Hyndman and Koehler 2006: absolute error over the in-sample error of
    the seasonal naive forecast, ``batch.fields["seasonal_error"]`` [n]), ``smape`` in percent (M4: 200 |e| / (|y| +
    |f|)), ``mae``, ``mse``; the same of the seasonal naive forecast under ``naive_``; ``samples`` counts windows.
    """

    def __init__(self, lookback: int, horizon: int, season: int) -> None:
        if season > lookback:
            raise ValueError(f"the seasonal naive forecast needs a lookback of a season ({season}), not {lookback}")
        self._lookback, self._horizon, self._season = lookback, horizon, season
        names = [f"{who}{what}" for who in ("", "naive_") for what in ("mase", "smape", "mae", "mse")]
        self.sums: dict[str, Tensor] = {
            name: torch.zeros(horizon, dtype=torch.float64) for name in (*names, "loss", "samples")
        }
        self._worst: list[dict[str, Any]] = []

    def update(self, outputs: Tensor, losses: Tensor, batch: Batch) -> None:
        kept = batch.position >= 0
        values = batch.fields["values"].double().cpu()[kept]
        scale = batch.fields["seasonal_error"].double().cpu()[kept]
        past, future = values[:, : self._lookback], values[:, self._lookback :]
        forecast = outputs.detach().double().cpu()[kept]
        naive = self._naive(past)
        for who, guess in (("", forecast), ("naive_", naive)):
            error = (guess - future).abs()
            self.sums[f"{who}mae"] += error.mean(2).sum(0)
            self.sums[f"{who}mse"] += error.square().mean(2).sum(0)
            self.sums[f"{who}mase"] += (error.mean(2) / scale[:, None]).sum(0)
            self.sums[f"{who}smape"] += (200 * error / (guess.abs() + future.abs()).clamp(min=1e-12)).mean(2).sum(0)
        self.sums["loss"] += losses.detach().double().cpu()[kept].sum()
        self.sums["samples"] += len(values)
        self._keep_worst(past, future, forecast, naive, batch, kept)

    def compute(self) -> Scores:
        count = self.sums["samples"].clamp(min=1)
        scores = {name: float((total / count).mean()) for name, total in self.sums.items() if name != "samples"}
        return {**scores, "samples": float(self.sums["samples"][0])}

    def examples(self) -> list[dict[str, Any]]:
        return self._worst

    def report(self, folder: Path, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
        from dltrain.metrics.plots import forecasts, horizon_errors

        steps = {
            who: (self.sums[name] / self.sums["samples"].clamp(min=1)).tolist()
            for who, name in (("model", "mase"), ("seasonal naive", "naive_mase"))
        }
        pictures = [
            ("Error by step ahead", horizon_errors(steps, folder / "horizon.png")),
            ("Worst forecasts", forecasts(examples, folder / "forecasts.png")),
        ]
        mistakes = [{"key": example["key"], "loss": example["loss"]} for example in examples]
        return {"mase_by_step": steps, "mistakes": mistakes}, pictures

    def _naive(self, past: Tensor) -> Tensor:
        """The last season, repeated over the horizon."""
        season = past[:, -self._season :]
        return season.repeat(1, -(-self._horizon // self._season), 1)[:, : self._horizon]

    def _keep_worst(
        self, past: Tensor, future: Tensor, forecast: Tensor, naive: Tensor, batch: Batch, kept: Tensor
    ) -> None:
        rows = kept.nonzero()[:, 0].tolist()
        errors = (forecast - future).abs().mean((1, 2))
        candidates = list(self._worst)
        for place in errors.topk(min(KEPT, len(rows))).indices.tolist():
            series = {"past": past, "future": future, "forecast": forecast, "naive": naive}
            example = {name: tensor[place, :, 0].tolist() for name, tensor in series.items()}
            candidates.append({"key": batch.keys[rows[place]], "loss": float(errors[place]), **example})
        self._worst = worst(candidates, KEPT)
