"""Forecasting: the next `horizon` steps of a series from its last `lookback` steps.

    dltrain train timeseries/forecast --preset co2
    torchrun --nproc-per-node 2 recipes/timeseries/forecast.py --preset co2

A sample is a window inside a long series (a `.npy` member of a shard); the manifest's fact `series` gives each series'
mean, deviation and seasonal error (the in-sample error of the seasonal naive forecast, by which MASE is scaled).
"""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn

from dltrain import Batch, Config, Plan, Sample, Task, main, preset
from dltrain.config import Data, Evaluation, Length, Logging, Model, Optim, Run, Schedule
from dltrain.data.windows import Window
from dltrain.metrics.forecasting import Forecasting
from dltrain.models.timeseries import dlinear, mixer, patchtst


class ForecastModel(Model):
    """The network, and the windows it sees."""

    name: Literal["dlinear", "patchtst", "mixer"] = "dlinear"
    """Two linear layers, a transformer over patches, or MLPs that mix steps and channels (TSMixer)."""
    lookback: int = Field(default=260, gt=0)
    """Steps of past."""
    horizon: int = Field(default=52, gt=0)
    """Steps to forecast."""
    season: int = Field(default=52, gt=0)
    """Steps of a season, for the seasonal naive forecast and MASE."""
    kernel: int = Field(default=25, gt=0)
    """dlinear: steps of the moving average that splits off the trend."""
    patch: int = Field(default=16, gt=0)
    """patchtst: steps of a patch."""
    stride: int = Field(default=8, gt=0)
    """patchtst: steps from one patch to the next."""
    channels: int = Field(default=1, gt=0)
    """mixer: channels of the series; the others take any number."""
    depth: int = Field(default=3, gt=0)
    """patchtst, mixer: blocks."""
    width: int = Field(default=64, gt=0)
    """patchtst: width of a token; mixer: hidden units of an MLP."""
    heads: int = Field(default=4, gt=0)
    """patchtst: heads of attention; they divide the width."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """patchtst, mixer: dropout in every block."""

    @model_validator(mode="after")
    def _fits(self) -> "ForecastModel":
        if self.name == "patchtst" and self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if self.name == "patchtst" and self.lookback < self.patch:
            raise ValueError(f"a lookback of {self.lookback} steps is shorter than a patch of {self.patch}")
        return self


class ForecastConfig(Config):
    model: ForecastModel = ForecastModel()


@preset
def co2() -> ForecastConfig:
    """Weekly CO2 at Mauna Loa, a year ahead; the last four years held out."""
    return ForecastConfig(
        run=Run(length=Length.parse("30ep"), threads=1),  # too small a model to share out
        data=Data(train="bundled://co2/train", evaluation="bundled://co2/heldout", global_batch_size=64),
        optim=Optim(learning_rate=1e-3, weight_decay=0.0),
        schedule=Schedule(warmup=Length.parse("1ep")),
        evaluation=Evaluation(every=Length.parse("10ep"), metric="mase", mode="min"),
        logging=Logging(every=Length.parse("20st")),
    )


@preset
def co2_patchtst() -> ForecastConfig:
    """The same by PatchTST, for trying layouts; so short a series is DLinear's."""
    config = co2()
    return config.model_copy(
        update={
            "model": ForecastModel(name="patchtst", width=32),
            "run": Run(length=Length.parse("4ep")),
            "evaluation": config.evaluation.model_copy(update={"every": Length.parse("2ep")}),
        }
    )


class Forecast(Task):
    """Squared error in units of each series' deviation."""

    config: ForecastConfig

    def window(self) -> Window:
        return Window(self.config.model.lookback, self.config.model.horizon)

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        scale = self.facts["series"][sample.key.partition("@")[0]]
        return {
            "values": sample.fields["values"].astype(np.float32),
            "mean": np.float32(scale["mean"]),
            "deviation": np.float32(scale["deviation"]),
            "seasonal_error": np.float32(scale["seasonal_error"]),
        }

    def model(self) -> nn.Module:
        model = self.config.model
        if model.name == "dlinear":
            return dlinear.DLinear(model.lookback, model.horizon, model.kernel)
        if model.name == "mixer":
            return mixer.Mixer(
                model.lookback,
                model.horizon,
                model.channels,
                depth=model.depth,
                width=model.width,
                dropout=model.dropout,
            )
        return patchtst.PatchTST(
            model.lookback,
            model.horizon,
            patch=model.patch,
            stride=model.stride,
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            dropout=model.dropout,
        )

    def plan(self) -> Plan:
        plans = {"dlinear": dlinear.PLAN, "patchtst": patchtst.PLAN, "mixer": mixer.PLAN}
        return plans[self.config.model.name]

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (self.scaled(batch)[:, : self.config.model.lookback],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        future = self.scaled(batch)[:, self.config.model.lookback :]
        return (outputs - future).square().mean((1, 2))

    def predictions(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Forecasts in the units of the series."""
        mean, deviation = batch.fields["mean"], batch.fields["deviation"]
        return outputs * deviation[:, None, None] + mean[:, None, None]

    def scaled(self, batch: Batch) -> Tensor:
        mean, deviation = batch.fields["mean"], batch.fields["deviation"]
        return (batch.fields["values"] - mean[:, None, None]) / deviation[:, None, None]

    def metrics(self) -> Forecasting:
        model = self.config.model
        return Forecasting(model.lookback, model.horizon, model.season)


if __name__ == "__main__":
    main(Forecast)
