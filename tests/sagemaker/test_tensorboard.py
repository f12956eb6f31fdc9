"""Where a SageMaker job wants TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker.tensorboard import CONFIG, FILE, LOCAL_PATH, tensorboard_folder
from tests.conftest import TINY, Cli


def described(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    file = folder / CONFIG
    file.write_text(text)
    return file


def test_the_local_path_is_found_wherever_the_file_lies(tmp_path: Path) -> None:
    said = json.dumps({"LocalPath": "/opt/ml/output/mine", "S3OutputPath": "s3://bucket/events"})
    described(tmp_path / "ml" / "input" / "config", said)
    file = described(tmp_path / "elsewhere", json.dumps({"LocalPath": "/there"}))
    base = {"SAGEMAKER_BASE_DIR": str(tmp_path / "ml")}
    assert tensorboard_folder(base) == "/opt/ml/output/mine"
    assert tensorboard_folder({"SM_INPUT_CONFIG_DIR": str(file.parent)}) == "/there"
    assert tensorboard_folder({**base, FILE: str(file)}) == "/there"


def test_without_a_file_there_is_none_and_without_a_path_it_is_sagemakers_usual_one(tmp_path: Path) -> None:
    assert tensorboard_folder({"SAGEMAKER_BASE_DIR": str(tmp_path)}) == ""
    described(tmp_path / "input" / "config", '{"S3OutputPath": "s3://bucket/events"}')
    assert tensorboard_folder({"SAGEMAKER_BASE_DIR": str(tmp_path)}) == LOCAL_PATH


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    described(tmp_path / "input" / "config", text)
    with pytest.raises(UserError, match="is no JSON object with a LocalPath"):
        tensorboard_folder({"SAGEMAKER_BASE_DIR": str(tmp_path)})


@pytest.mark.slow
def test_a_job_writes_where_sagemaker_will_look(cli: Cli, tmp_path: Path) -> None:
    file = described(tmp_path / "config", json.dumps({"LocalPath": str(tmp_path / "output")}))
    job = ("train", TINY, "--preset", "small", "--logging.tensorboard", "true", "--run.name", "job")
    done = cli(*job, **{FILE: str(file)})
    assert done.status == 0, done.err
    assert list((tmp_path / "output" / "job").glob("events.out.tfevents.*"))
    assert not (tmp_path / "runs" / "job" / "tensorboard").exists()
