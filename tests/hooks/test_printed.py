"""What is printed is found again by the metric definitions of the same table."""

from __future__ import annotations

import math
import re

import pytest

from dltrain.hooks.printed import COLUMNS, definitions, evaluation_line, step_line

VALUES = (0.0, 1.0, 0.123456, 1e-05, 1.5e-12, 123456.789, 9.99999e8, 1e20, math.nan, math.inf, -math.inf, -0.25)
SCORES = ("accuracy", "balanced_accuracy", "loss", "accuracy_top5", "samples")
PREFIXES = ("", "[algo-1] ", "[1,mpirank:0,algo-1]<stdout>")


def found(line: str) -> dict[str, str]:
    """What SageMaker takes from a line: each expression's first group."""
    matches = {each["Name"]: re.search(each["Regex"], line) for each in definitions(SCORES)}
    return {name: match[1] for name, match in matches.items() if match is not None}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_printed_number_of_a_step_is_found_by_its_own_expression(value: float, prefix: str) -> None:
    for chosen in COLUMNS:
        record = {"step": 120, "epoch": 1.5, **{column.key: 0.5 for column in COLUMNS}, chosen.key: value}
        line = prefix + step_line(record, "674")
        numbers = found(line)
        assert set(numbers) == {column.metric for column in COLUMNS}, line
        for column in COLUMNS:
            expected = float(f"{record[column.key] * column.factor:{column.form}}")
            assert float(numbers[column.metric]) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", VALUES)
def test_every_printed_score_is_found_by_its_own_expression(value: float) -> None:
    for place, chosen in enumerate(SCORES):
        scores = {name: place + 0.25 for place, name in enumerate(SCORES)} | {chosen: value}
        line = evaluation_line(
            {"step": 68, "epoch": 3, **{f"evaluation/{name}": each for name, each in scores.items()}}
        )
        numbers = found(line)
        assert set(numbers) == {f"validation:{name}" for name in SCORES}
        assert float(numbers[f"validation:{chosen}"]) == pytest.approx(float(f"{value:.4g}"), nan_ok=True), place


def test_other_lines_are_no_metrics() -> None:
    for line in ("run /opt/ml/x on 4 rank(s)", "stopping at step 3 (SIGTERM); saving", "finished 68 steps in 3.4 s: x"):
        assert not found(line)


def test_definitions_fit_sagemakers_limits() -> None:
    for each in definitions(SCORES):
        assert 1 <= len(each["Name"]) <= 255
        assert 1 <= len(each["Regex"]) <= 500
