"""Runs among the checkpoints that a job finds: gone on with, left alone because another job is at work, or told of."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dltrain.config import Config, Run
from dltrain.errors import UserError
from dltrain.run_folder import RunFolder, choose_run
from dltrain.sagemaker.folders import Folders
from dltrain.sagemaker.placing import about, refuse_alive
from dltrain.sagemaker.training_job import TrainingJob

JOB = TrainingJob("container", "second", "", Folders.read({}), "algo-1", ("algo-1",))


def left(folder: Path, last: float | None = None, **record: Any) -> RunFolder:
    """A run as the job ``first`` has left it, whose last line was written ``last`` seconds ago."""
    run = RunFolder(folder / "run-1")
    run.path.mkdir()
    usual = {"recipe": "/opt/ml/code/mine.py", "preset": "small", "status": "running", "created": 1e9, "job": "first"}
    run.record.write_text(json.dumps({**usual, **record}))
    if last is not None:
        run.metrics.write_text(json.dumps({"kind": "step", "time": time.time() - last}) + "\n")
    return run


def test_a_run_that_another_job_writes_to_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of job first, which wrote to it 4\d s ago.*--run.resume run-1"):
        refuse_alive(left(tmp_path, 42), JOB)


@pytest.mark.parametrize(
    ("last", "record"),
    [
        (4000, {}),  # it has died meanwhile
        (42, {"status": "stopped"}),
        (42, {"job": "second"}),  # this job, before it was interrupted
        (42, {"job": ""}),
        (None, {}),
    ],
    ids=["silent", "stopped", "own", "of no job", "never at work"],
)
def test_any_other_is_gone_on_with(tmp_path: Path, last: float | None, record: dict[str, Any]) -> None:
    run = left(tmp_path, last, **record)
    refuse_alive(run, JOB)
    assert about(run, tmp_path).startswith("going on with run run-1")


def test_what_is_found_is_told(tmp_path: Path) -> None:
    fresh = RunFolder(tmp_path / "run-2")
    assert about(fresh, tmp_path) == ""
    assert about(left(tmp_path, status="finished"), tmp_path) == "going on with run run-1 of job first"
    told = about(fresh, tmp_path)
    assert told.startswith(f"none of the runs in {tmp_path} is one that is not finished and has this recipe and preset")
    assert told.endswith("run-1 (finished); beginning a new run")


def test_a_recipe_may_have_moved_between_two_ways_of_starting(tmp_path: Path) -> None:
    run = left(tmp_path)
    config = Config(run=Run(folder=str(tmp_path), resume="auto"))
    there = "/opt/ml/input/data/code/mine.py"
    assert choose_run(config, there, "small", moved=True) == run
    assert choose_run(config, there, "small") != run
    assert choose_run(config, there.replace("mine", "other"), "small", moved=True) != run
    assert choose_run(config, there, "large", moved=True) != run
