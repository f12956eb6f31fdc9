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


@pytest.mark.slow
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
    alone = cli("eval", second.result["run"])
    assert alone.status == 0, alone.err
    assert "scored under the default layout, for the run's does not fit: parallel.pp 2 x" in alone.err
    assert alone.result["mase"] == pytest.approx(scored.result["mase"], abs=1e-5)
    best = {"step-00000004": first, "step-00000008": second}[Path(scored.result["checkpoint"]).name]
    assert scored.result["mase"] == pytest.approx(best.result["mase"], abs=1e-5)


@pytest.mark.slow
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


OWN = str(Path(__file__).parents[1] / "recipes" / "own_model.py")
OWN_LAYOUTS = {
    "without a plan": ("--preset", "auto", "--parallel.pp", "2", "--parallel.dp_shard", "2"),
    "with ten lines": ("--preset", "planned", "--parallel.pp", "2", "--parallel.tp", "2"),
    "computed again": ("--preset", "auto", "--parallel.pp", "2", "--parallel.activation_checkpointing", "full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", OWN_LAYOUTS.values(), ids=OWN_LAYOUTS)
def test_a_model_of_someone_else_trains_in_stages(cli: Cli, words: tuple[str, ...]) -> None:
    judged = cli("verify", OWN, *words, "--nproc", "4", "--steps", "5")
    assert judged.status == 0, judged.out + judged.err
    assert judged.result["loss"] < 1e-5
    done = cli("train", OWN, *words, "--nproc", "4", timeout=300)
    assert done.status == 0, done.err
    assert done.result["accuracy"] > 0.95


@pytest.mark.slow
def test_a_trace_takes_no_split_layers(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "chainless.py"
    recipe.write_text(Path(OWN).read_text().replace('    chain=("embed", "blocks.*", "head"),\n', ""))
    done = cli("train", str(recipe), *OWN_LAYOUTS["with ten lines"], "--nproc", "4")
    assert done.status == 2
    assert "parallel.tp is 2, and parallel.pp cuts GatedNet by tracing" in done.err
