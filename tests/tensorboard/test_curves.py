"""Curves of precision and recall: those of scikit-learn at the same thresholds, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score

from dltrain.metrics.base import reduce_sums
from dltrain.metrics.classification import CURVES, THRESHOLDS, Classification
from dltrain.tensorboard.curves import curve, points
from dltrain.testing.ranks import run_ranks
from tests.metrics.test_metrics import batch_of, logits_and_labels, score


def test_points_are_those_of_scikit_learn() -> None:
    logits, labels = logits_and_labels(301)
    table = points(score(slice(None), logits, labels).curves()["3"])
    probabilities, is_three = logits.softmax(1)[:, 3], labels == 3
    for place in (0, 1, 10, 60, 100):
        found = (probabilities * (THRESHOLDS - 1)).long() >= place
        assert table[4, place] == pytest.approx(precision_score(is_three, found, zero_division=1))
        assert table[5, place] == pytest.approx(recall_score(is_three, found))
    assert (table[:4].sum(0) == 301).all()
    assert table[4, -1] == 1.0, "nothing is as certain as that"


def curves_on_rank(rank: int, ranks: int) -> list[float]:
    logits, labels = logits_and_labels(301)
    metric = score(slice(200, 301) if rank else slice(0, 200), logits, labels, pad=0)
    reduce_sums(metric)
    return metric.curves()["2"].flatten().tolist()


def test_counts_of_two_ranks_add_up_to_those_of_one() -> None:
    whole = score(slice(None), *logits_and_labels(301)).curves()["2"].flatten().tolist()
    assert run_ranks(curves_on_rank, 2, 2) == [whole, whole]


def test_padding_is_in_no_curve() -> None:
    logits, labels = logits_and_labels(50)
    padded, plain = score(slice(0, 50), logits, labels, pad=8), score(slice(0, 42), logits, labels)
    assert torch.equal(padded.curves()["all classes"], plain.curves()["all classes"])


def test_with_very_many_classes_there_is_one_curve_of_all() -> None:
    classes = CURVES + 1
    metric = Classification([str(name) for name in range(classes)])
    labels = torch.arange(4)
    metric.update(torch.eye(classes)[:4] * 20, torch.zeros(4), batch_of({"cls": labels}))
    (name,) = metric.curves()
    assert name == "all classes"
    counts = metric.curves()[name]
    assert counts.sum(1).tolist() == [4, 4 * (classes - 1)]
    assert points(counts)[4, 60] == 1.0


def test_a_model_that_diverged_has_curves() -> None:
    metric = Classification(["a", "b"])
    metric.update(torch.full((3, 2), float("nan")), torch.zeros(3), batch_of({"cls": torch.tensor([0, 1, 1])}))
    table = points(metric.curves()["b"])
    assert np.isfinite(table).all()
    assert curve("b", metric.curves()["b"]).value[0].metadata.plugin_data.plugin_name == "pr_curves"
