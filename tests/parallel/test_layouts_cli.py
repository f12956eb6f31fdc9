"""Recipes under layouts, by the command that users have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli


def test_a_recipe_gives_the_scores_of_one_process_under_split_layers(cli: Cli) -> None:
    words = ("train", "image/classify", "--preset", "vit-tiny", "--model.dropout", "0", "--run.length", "12st")
    words += ("--schedule.warmup", "2st")
    alone, split = cli(*words), cli(*words, "--nproc", "4", "--parallel.tp", "2")
    assert split.status == 0, split.err
    assert split.result["samples"] == 360
    assert split.result["loss"] == pytest.approx(alone.result["loss"], abs=1e-4)
    assert split.result["accuracy"] == pytest.approx(alone.result["accuracy"], abs=0.01)


def test_a_run_goes_on_under_another_layout(cli: Cli) -> None:
    words = ("train", "timeseries/forecast", "--preset", "co2_patchtst", "--run.name", "mine", "--model.depth", "1")
    words += ("--schedule.warmup", "1st")
    first = cli(*words, "--run.length", "4st", "--nproc", "2", "--parallel.tp", "2")
    assert first.status == 0, first.err
    second = cli(*words, "--run.length", "8st", "--run.resume", "auto", "--nproc", "2", "--parallel.pp", "2",
                 "--parallel.tp", "1")  # fmt: skip
    assert second.status == 0, second.err
    assert second.result["step"] == 8
    assert Path(second.result["run"]).name == "mine"
    scored = cli("eval", second.result["run"], "--nproc", "2", "--parallel.dp_shard", "2", "--parallel.pp", "1")
    assert scored.status == 0, scored.err
    best = {"step-00000004": first, "step-00000008": second}[Path(scored.result["checkpoint"]).name]
    assert scored.result["mase"] == pytest.approx(best.result["mase"], abs=1e-5)


def test_a_model_that_does_not_fit_the_layout_is_refused_before_the_first_step(cli: Cli) -> None:
    words = ("train", "image/classify", "--preset", "digits", "--nproc", "2")
    for layout, sentence in (
        (("--parallel.tp", "2"), "the plan of SmallCNN does not say how to split its layers"),
        (("--parallel.pp", "2", "--parallel.stages_per_rank", "3", "--parallel.schedule", "looped_bfs"),
         "the pipeline has 6 stages, and the plan of SmallCNN names 4 modules to share out"),
    ):  # fmt: skip
        done = cli(*words, *layout)
        assert done.status == 2
        assert sentence in done.err
        assert "Traceback" not in done.err
