"""The debugger in a run: it changes nothing, it survives a stop, and it finds live what it finds afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.debugger.run import open_run
from tests.conftest import TINY, Cli

SMALL = ("train", TINY, "--preset", "small")
EVERY = ("--debugger.every", "3st")


def records(run: str | Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("grad_norm")) for line in lines]


@pytest.mark.parametrize(
    "layout",
    [(), pytest.param(("--nproc", "2", "--parallel.dp_shard", "2"), marks=pytest.mark.slow)],
    ids=["alone", "fsdp 2"],
)
def test_training_is_the_same_to_the_last_bit(cli: Cli, layout: tuple[str, ...], tmp_path: Path) -> None:
    assert cli(*SMALL, *layout, "--run.name", "without").status == 0
    watched = cli(*SMALL, *layout, "--run.name", "watched", "--debugger.every", "1st")
    assert watched.status == 0, watched.err
    assert records(tmp_path / "runs/watched") == records(tmp_path / "runs/without")
    run = open_run(str(tmp_path / "runs/watched"))
    assert run.steps() == list(range(1, 17))
    assert run.scalars("loss")[1].tolist() == [line[1] for line in records(tmp_path / "runs/without") if line[2]]
    assert not run.findings()


@pytest.mark.slow
def test_a_run_that_was_killed_has_the_statistics_of_one_that_was_not(cli: Cli, tmp_path: Path) -> None:
    assert cli(*SMALL, *EVERY, "--run.name", "whole").status == 0
    again = (*SMALL, *EVERY, "--run.name", "broken", "--run.resume", "auto")
    assert cli(*again, TINY_DIE="10:SIGKILL").status != 0
    assert cli(*again).status == 0
    whole, broken = open_run(str(tmp_path / "runs/whole")), open_run(str(tmp_path / "runs/broken"))
    assert whole.steps() == broken.steps() == [1, 3, 6, 9, 12, 15]
    for name in whole.tensor_names():
        assert whole.tensor(name).moments.tolist() == broken.tensor(name).moments.tolist(), name
    assert whole.scalars("loss")[1].tolist() == broken.scalars("loss")[1].tolist()


WILD = ("--optim.learning_rate", "1e9", "--optim.max_norm", "0", "--run.nonfinite", "skip", "--debugger.every", "2st")


def test_what_is_found_live_is_found_afterwards_and_shown(cli: Cli, tmp_path: Path) -> None:
    done = cli(*SMALL, *WILD, "--nproc", "2")
    assert done.status == 0, done.err
    run = open_run(str(tmp_path / done.result["run"]))
    found = run.findings()
    assert found
    assert [str(each) for each in found] == [str(each) for each in run.judge(["default"])]
    assert all(f"warning: {each}" in done.err for each in found)
    shown = cli("debug", "show", done.result["run"])
    assert shown.status == 0, shown.err
    assert all(f"{each.rule} at step {each.step}" in shown.out for each in found)
    assert "mean |gradient|" in shown.out
    asked = cli("debug", "show", done.result["run"], "--rules", "LossNotDecreasing:num_steps=3")
    assert "LossNotDecreasing at step" in asked.out


def test_a_finding_may_stop_the_run(cli: Cli) -> None:
    done = cli(*SMALL, *WILD, "--nproc", "2", "--debugger.actions", "stop")
    assert done.status == 75, done.err
    assert "stopped and saved at step" in done.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--debugger.rules", "[VanishingGradiant]"), "has no rule 'VanishingGradiant'; did you mean 'VanishingGradie"),
        (("--debugger.collect", "[weight]"), "debugger.collect names 'weight', which there is not; did you mean 'weig"),
        (("--debugger.every", "2ep"), "give it in steps, such as 50st"),
    ],
)
def test_mistakes_are_one_sentence(cli: Cli, words: tuple[str, ...], sentence: str) -> None:
    done = cli(*SMALL, "--debugger.steps", "[3]", *words)
    assert done.status == 2
    assert sentence in done.err
    assert "Traceback" not in done.err
