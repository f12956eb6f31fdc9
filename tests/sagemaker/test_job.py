"""A training job as SageMaker starts it: channels instead of URLs."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from dltrain.data.bundled import build
from tests.conftest import Cli

TRAIN = ("train", "image/classify", "--preset", "digits", "--data.train", "", "--data.evaluation", "")
TRAIN += ("--evaluation.report", "false", "--logging.tensorboard", "false", "--logging.progress", "plain")
SHORT = ("--run.length", "1ep", "--schedule.warmup", "0st", "--evaluation.every", "1ep", "--run.name", "job")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """SageMaker's folders, with the digits in the channels ``train`` and ``validation``."""
    train, held_out = build("digits", str(tmp_path / "digits"))
    data = tmp_path / "ml" / "input" / "data"
    data.mkdir(parents=True)
    (data / "train").symlink_to(train)
    (data / "validation").symlink_to(held_out)
    (tmp_path / "ml" / "input" / "config").mkdir()
    return tmp_path / "ml"


def describe(base: Path, **modes: str) -> dict[str, str]:
    tree = {name: {"TrainingInputMode": mode, "S3DistributionType": "FullyReplicated"} for name, mode in modes.items()}
    (base / "input" / "config" / "inputdataconfig.json").write_text(json.dumps(tree))
    return {"SAGEMAKER_BASE_DIR": str(base)}


@pytest.mark.slow
def test_channels_that_are_folders_stand_for_the_urls(cli: Cli, base: Path) -> None:
    variables = describe(base, train="FastFile", validation="File")
    done = cli(*TRAIN, *SHORT, **variables)
    assert done.status == 0, done.err
    assert done.result["samples"] == 360


@pytest.mark.slow
def test_a_pipe_is_read_as_it_comes_told_in_one_line_and_not_resumed(cli: Cli, base: Path) -> None:
    variables = describe(base, train="Pipe")
    fifo = base / "input" / "data" / "train_0"
    os.mkfifo(fifo)
    tars = b"".join(tar.read_bytes() for tar in sorted((base.parent / "digits" / "train").glob("*.tar")))

    def bring() -> None:
        with fifo.open("wb") as pipe:
            try:
                pipe.write(tars)
            except BrokenPipeError:
                return  # the run has had enough

    bringing = threading.Thread(target=bring, daemon=True)
    bringing.start()
    steps = ("--schedule.warmup", "0st", "--checkpoint.every", "5st", "--evaluation.every", "5st", "--run.name", "job")
    done = cli(*TRAIN, *steps, "--run.length", "5st", **variables)
    assert done.status == 0, done.err
    assert done.err.count("is a Pipe: an exact resume and another world size are not available there") == 1
    bringing.join(10)
    again = cli(*TRAIN, *steps, "--run.length", "9st", "--run.resume", "auto", **variables)
    assert again.status == 2
    assert "cannot be resumed from channel 'train': it is a Pipe" in again.err
    assert "Traceback" not in again.err
