"""Metrics against scikit-learn and against arithmetic, exact under padding and any split over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from dltrain.data.batch import Batch
from dltrain.metrics.base import reduce_sums
from dltrain.metrics.classification import Classification
from dltrain.metrics.forecasting import Forecasting
from dltrain.testing.ranks import run_ranks


def batch_of(fields: dict[str, torch.Tensor], weight: torch.Tensor | None = None) -> Batch:
    count = len(next(iter(fields.values())))
    weight = torch.ones(count) if weight is None else weight
    position = torch.where(weight > 0, torch.arange(count), -1)
    return Batch(fields, weight, tuple(f"k{place}" for place in range(count)), position)


def logits_and_labels(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (count,), generator=generator)
    return torch.randn(count, 7, generator=generator) + 2 * torch.eye(7)[labels], labels


def score(places: slice, logits: torch.Tensor, labels: torch.Tensor, pad: int = 0) -> Classification:
    metric = Classification([str(place) for place in range(7)])
    logits, labels = logits[places], labels[places]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weight = torch.ones(len(labels))
    if pad:
        weight[-pad:] = 0
    metric.update(logits, losses, batch_of({"cls": labels}, weight))
    return metric


def test_classification_agrees_with_scikit_learn() -> None:
    logits, labels = logits_and_labels(301)
    scores = score(slice(None), logits, labels).compute()
    predicted = logits.argmax(1)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert scores["samples"] == 301


def test_padding_counts_for_nothing() -> None:
    logits, labels = logits_and_labels(50)
    assert score(slice(0, 50), logits, labels, pad=8).compute() == score(slice(0, 42), logits, labels).compute()


def score_on_rank(rank: int, ranks: int) -> dict[str, float]:
    logits, labels = logits_and_labels(301)
    metric = score(slice(200, 301) if rank else slice(0, 200), logits, labels)
    reduce_sums(metric)
    return metric.compute()


def test_an_uneven_split_over_ranks_gives_the_scores_of_one_process() -> None:
    whole = score(slice(None), *logits_and_labels(301)).compute()
    for scores in run_ranks(score_on_rank, 2, 2):
        assert scores == pytest.approx(whole, rel=1e-12)


def test_calibration_error_by_hand() -> None:
    # two classes; ten samples at confidence p = 1/(1+e^-2) = 0.8808 of which 6 are right, so the only bin's gap is
    # |0.8808 - 0.6| = 0.2808
    logits = torch.tensor([[2.0, 0.0]]).repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    metric = Classification(["a", "b"])
    metric.update(logits, torch.zeros(10), batch_of({"cls": labels}))
    assert metric.compute()["calibration_error"] == pytest.approx(1 / (1 + np.exp(-2)) - 0.6, abs=1e-6)


def test_forecast_errors_by_hand() -> None:
    # past 1 2 3 4 with a season of 2, so the naive forecast of three steps is 3 4 3; truth 5 6 7, ours 4 6 9
    values = torch.tensor([[[1.0], [2], [3], [4], [5], [6], [7]]])
    forecast = torch.tensor([[[4.0], [6], [9]]])
    metric = Forecasting(lookback=4, horizon=3, season=2)
    metric.update(forecast, torch.tensor([2.5]), batch_of({"values": values, "seasonal_error": torch.tensor([2.0])}))
    scores = metric.compute()
    assert scores["mae"] == pytest.approx((1 + 0 + 2) / 3)
    assert scores["mse"] == pytest.approx((1 + 0 + 4) / 3)
    assert scores["mase"] == pytest.approx((1 + 0 + 2) / 3 / 2)
    assert scores["smape"] == pytest.approx((200 * 1 / 9 + 0 + 200 * 2 / 16) / 3)
    assert scores["naive_mae"] == pytest.approx((2 + 2 + 4) / 3)
    assert (scores["loss"], scores["samples"]) == (2.5, 1.0)


def test_seasonal_naive_on_m4_hourly_gives_the_published_figures() -> None:
    """M4 Hourly, season 24, horizon 48: sMAPE 13.912 and MASE 1.1932 (the competition's own benchmark)."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not (folder / "m4_Hourly-test.csv").is_file():
        pytest.skip("the M4 Hourly files are not beside the project")

    def read(name: str) -> list[np.ndarray]:
        lines = (folder / name).read_text().splitlines()[1:]
        return [np.array([float(v) for v in line.replace('"', "").split(",")[1:] if v]) for line in lines]

    metric = Forecasting(lookback=48, horizon=48, season=24)
    for past, future in zip(read("m4_Hourly-train.csv"), read("m4_Hourly-test.csv"), strict=True):
        values = torch.tensor(np.concatenate([past[-48:], future]))[None, :, None]
        scale = torch.tensor([np.abs(past[24:] - past[:-24]).mean()])
        batch = batch_of({"values": values, "seasonal_error": scale})
        metric.update(torch.zeros(1, 48, 1), torch.zeros(1), batch)
    scores = metric.compute()
    assert scores["naive_smape"] == pytest.approx(13.912, abs=5e-4)
    assert scores["naive_mase"] == pytest.approx(1.1932, abs=5e-5)
