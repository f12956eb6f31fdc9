"""What the terminal tells of a run: findings, what stands out among layers, units, time and the machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dltrain.debugger.inspecting import show_names, show_tensor
from dltrain.debugger.report.writing import write_report
from dltrain.debugger.show import show_run, standing_out
from dltrain.errors import UserError
from tests.conftest import Cli
from tests.debugger.recorded import finding, recorded
from tests.debugger.test_smdebug import OUTPUT, opened

Captured = pytest.CaptureFixture[str]


def test_findings_stand_by_rule_the_newest_last(tmp_path: Path, capsys: Captured) -> None:
    many = [finding(step, "LossSpike") for step in range(1, 20)]
    path = recorded(tmp_path, steps=20, findings=(finding(3, "DataWait"), *many, finding(30)))
    assert show_run(str(path), None) == 0
    shown = capsys.readouterr().out
    assert "LossSpike: 13 earlier finding(s), from step 1 on" in shown
    assert "21 finding(s); statistics of 5 steps, 1 to 20" in shown
    places = [shown.index(f"{rule} at step") for rule in ("DataWait", "LossSpike", "VanishingGradient")]
    assert places == sorted(places)
    assert shown.count("LossSpike at step") == 6
    assert "LossSpike at step 19: something <b>odd</b> at 19" in shown
    assert shown.count("It matters. Try [less].") == 3


def test_of_hundreds_of_layers_those_are_shown_that_stand_out(tmp_path: Path, capsys: Captured) -> None:
    show_run(str(recorded(tmp_path, blocks=60, steps=10)), None)
    shown = capsys.readouterr().out
    assert shown.count("278 more of 302 are nearer to the median of all") == 2
    assert "head.weight" in shown
    assert len(shown.splitlines()) < 75


def test_what_is_far_from_the_others_or_not_finite_stands_out() -> None:
    series = [np.array([1.0, 1e-3 * (1 + 0.01 * place)]) for place in range(50)]
    series[7] = np.array([1.0, 1e-9])
    series[20] = np.array([1.0, np.nan])
    series[30] = np.array([1.0, 0.0])
    series[40] = np.array([])
    assert standing_out(series, 4) == [7, 20, 30, 40]
    assert standing_out(series[:4], 4) == [0, 1, 2, 3]


def test_units_time_and_the_machine_are_told(tmp_path: Path, capsys: Captured) -> None:
    show_run(str(recorded(tmp_path, blocks=3, steps=20, ranks=3, gpus=2)), None)
    shown = capsys.readouterr().out
    assert "dead units in 1 of 3 layers: layers.0.act 60% (at first 3%)" in shown
    assert "time of 5 timed steps (median 5" in shown
    assert "percent of each rank's time" in shown
    assert "machine: gpu " in shown
    assert "cpu 60 (95th percentile 60) %" in shown
    assert "mean |update| / mean |weight|" in shown


def test_names_stand_by_kind(tmp_path: Path, capsys: Captured) -> None:
    path = str(recorded(tmp_path, steps=5))
    show_names(path, r"1\.mlp\.up")
    assert capsys.readouterr().out == (
        "weights (1)\n  layers.1.mlp.up.weight\n"
        "gradients (1)\n  gradient/layers.1.mlp.up.weight\n"
        "updates (1)\n  update/layers.1.mlp.up.weight\n"
    )
    show_names(path, "")
    assert "active (2)\n  active/layers.0.act\n  active/layers.1.act\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--names '\(' is no regular expression"):
        show_names(path, "(")
    with pytest.raises(UserError, match="has no tensor whose name has 'mlq' in it"):
        show_names(path, "mlq")


def test_a_tensor_is_a_table_over_steps(tmp_path: Path, capsys: Captured) -> None:
    path = str(recorded(tmp_path, steps=1500))
    show_tensor(path, "gradient/head.weight")
    shown = capsys.readouterr().out
    assert "gradient/head.weight (101 steps between these are left out)" in shown
    assert all(word in shown for word in ("abs mean", "fraction nonfinite", "│ 1 ", "│ 1500 "))
    with pytest.raises(UserError, match=r"did you mean 'gradient/head\.weight'"):
        show_tensor(path, "gradient/head.weigh")


def test_trials_of_sagemaker_debugger_are_shown_as_far_as_they_go(capsys: Captured) -> None:
    run = opened(OUTPUT / "two")
    gradients = run.tensor_names(kind="gradients")
    assert show_run(str(OUTPUT / "two"), None) == 0
    shown = capsys.readouterr().out
    assert "mean |gradient|" in shown
    assert all(name.partition("/")[2] in shown for name in gradients)
    show_names(str(OUTPUT / "two"), "")
    assert f"gradients ({len(gradients)})" in capsys.readouterr().out
    show_tensor(str(OUTPUT / "two"), gradients[0])
    assert "abs mean" in capsys.readouterr().out
    with pytest.raises(UserError, match="is a SageMaker Debugger trial, of which there is no report"):
        write_report(str(OUTPUT / "two"))


def test_names_and_tensors_by_the_command(cli: Cli, tmp_path: Path) -> None:
    recorded(tmp_path / "runs/mine", steps=5)
    assert cli("debug", "show", "mine", "--names").out.startswith("weights (12)\n")
    assert "not allowed with" in cli("debug", "show", "mine", "--names", "--tensor", "head.weight").err


@pytest.mark.slow
def test_a_run_that_was_only_profiled_has_no_statistics_of_tensors(cli: Cli) -> None:
    done = cli("train", "image/classify", "--preset", "digits", "--run.length", "25st", "--profiler.every", "1st")
    assert done.status == 0, done.err
    shown = cli("debug", "show", done.result["run"]).out
    assert "no statistics of tensors: the debugger was off" in shown
    assert "timed steps" in shown
