"""SageMaker's profiler configuration: what it asks for is done by our profiler, and the rest is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.config import Config, Profiler
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.profiler import apply_profiler, read_profiler

ASKED = {
    "S3OutputPath": "s3://bucket/prefix",
    "ProfilingIntervalInMilliseconds": 500,
    "ProfilingParameters": {
        "DetailedProfilingConfig": '{"StartStep": 7, "NumSteps": "3"}',
        "DataloaderProfilingConfig": '{"StartStep": 7, "MetricsRegex": ".*"}',
        "LocalPath": "/opt/ml/output/profiler/",
        "RotateMaxFileSizeInBytes": "10485760",
    },
}


def found(folder: Path, tree: Any, config: Config, *given: str) -> Config:
    file = folder / "input" / "config" / "profilerconfig.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return apply_profiler(config, given, Environment(), {"SAGEMAKER_BASE_DIR": str(folder)})


def test_steps_and_interval_are_taken_and_the_rest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = found(tmp_path, ASKED, Config())
    assert (made.profiler.trace, made.profiler.system) == ((8, 9, 10), 0.5)
    said = capsys.readouterr().err
    assert "profilerconfig.json: DataloaderProfilingConfig is left out: every logged line tells" in said
    assert said.count("\n") == 1


def test_what_config_and_command_say_counts(tmp_path: Path) -> None:
    own = Config(profiler=Profiler(trace=(2,)))
    assert found(tmp_path, ASKED, own).profiler == Profiler(trace=(2,), system=0.5)
    assert found(tmp_path, ASKED, Config(), "profiler__trace", "profiler.system") == Config()


@pytest.mark.parametrize("tree", [{}, {"S3OutputPath": "s3://b/c", "DisableProfiler": False},
                                  {**ASKED, "DisableProfiler": True}])  # fmt: skip
def test_a_file_that_asks_for_nothing_changes_nothing(tmp_path: Path, tree: Any) -> None:
    config = Config()
    assert found(tmp_path, tree, config) is config
    assert apply_profiler(config, (), Environment(), {"SAGEMAKER_BASE_DIR": str(tmp_path / "none")}) is config


def test_defaults_and_unknown_names() -> None:
    assert read_profiler({"ProfilingParameters": {"DetailedProfilingConfig": "{}"}}) == ({"trace": (6,)}, [])
    _, (told,) = read_profiler({"ProfilingParameters": {"DetailedProfilingConfg": "{}"}})
    assert told == "there is no 'DetailedProfilingConfg'; did you mean 'DetailedProfilingConfig'?"
    timed = {"DetailedProfilingConfig": '{"StartTimeInSecSinceEpoch": 1}'}
    assert read_profiler({"ProfilingParameters": timed}) == (
        {}, ["DetailedProfilingConfig names times; give StartStep and NumSteps"])  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ("{", "is not JSON"),
        (
            {"ProfilingParameters": {"DetailedProfilingConfig": '{"StartStep": -1}'}},
            "StartStep of .* is -1; give",
        ),
        ({"ProfilingParameters": {"DetailedProfilingConfig": "5"}}, "DetailedProfilingConfig is '5'"),
        ({**ASKED, "ProfilingIntervalInMilliseconds": "fast"}, "ProfilingIntervalInMilliseconds is 'fast'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, tree: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        found(tmp_path, tree, Config())
