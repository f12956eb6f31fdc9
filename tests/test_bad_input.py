"""The user's mistakes: one sentence that says what to change, a non-zero exit within seconds, nothing lost."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dltrain import storage
from dltrain.checkpoint.checkpointer import committed
from dltrain.data.bundled import build
from dltrain.data.manifest import load_manifest
from dltrain.data.writer import ShardWriter
from dltrain.testing.s3 import S3Server
from tests.conftest import TINY, Cli, Done

TRAIN = ("train", TINY, "--preset", "small", "--run.name", "bad")


def assert_one_sentence(done: Done, *parts: str, status: int = 2) -> None:
    errors = [line for line in done.err.splitlines() if line.startswith("dltrain:")]
    assert len(errors) == 1, done.err
    assert errors[0].startswith("dltrain: error: ")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in errors[0]
    assert done.status == status


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "image/classify", "--preset", "digits", "--optim.learning_rte", "0.1"], ["optim.learning_rate"]),
        (["train", "image/classify", "--preset", "digits", "--model.classe", "3"], ["did you mean 'model.classes'"]),
        (["train", "image/classify", "--preset", "digit"], ["no preset 'digit'", "did you mean 'digits'"]),
        (["train", "image/clasify"], ["no recipe 'image/clasify'", "image/classify"]),
        (["train", "mine.py"], ["no recipe file mine.py"]),
        (["train", "image/classify", "--preset", "digits", "--run.length", "10"], ["write epochs as '2ep'"]),
        (["train", "image/classify", "--preset", "digits", "--nproc", "0"], ["--nproc is 0"]),
        (["train", "image/classify", "--preset", "digits", "--run.folder", "s3://x"], ["local folder"]),
        (["train", "image/classify", "--presett", "digits"], ["unrecognized arguments", "--help"]),
        (["eval", "nothing"], ["there is no run 'nothing'"]),
        (["runs", "ls"], ["there is no folder runs"]),
        (["trian"], ["no command 'trian'", "did you mean 'train'"]),
        (["shards", "ls", "nowhere"], ["no data set at nowhere"]),
        (["shards", "build", "digit", "x"], ["did you mean 'digits'"]),
    ],
)
def test_mistakes_on_the_command_line_fail_in_a_second(cli: Cli, words: list[str], parts: list[str]) -> None:
    began = time.monotonic()
    done = cli(*words)
    seconds = time.monotonic() - began
    assert_one_sentence(done, *parts)
    assert seconds < 1.0 * float(os.environ.get("DLTRAIN_TEST_SLOWNESS", "2")), f"{seconds:.2f} s"


SLOW = pytest.mark.slow
"""Told where others are, which stay in the default suite: each starts two ranks."""


@pytest.mark.parametrize(
    ("settings", "variables", "parts"),
    [
        (["--data.train", "s3://no-such-bucket/x"], {}, ["no bucket 'no-such-bucket'"]),
        pytest.param(
            ["--data.train", "s3://data/none"],
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            ["cannot reach", "127.0.0.1:9"],
            marks=SLOW,
        ),
        pytest.param(["--data.train", "s3://data/nothing"], {}, ["no data set at s3://data/nothing"], marks=SLOW),
        pytest.param(["--data.train", "bundled://digits/tain"], {}, ["did you mean 'train'"], marks=SLOW),
        pytest.param(["--data.train", ""], {}, ["data.train is empty"], marks=SLOW),
        (["--data.global_batch_size", "1"], {}, ["data.global_batch_size is 1, smaller than the 2 data ranks"]),
        (["--parallel.dp_replicate", "3"], {}, ["does not divide the 2 ranks"]),
        (["--schedule.warmup", "99st"], {}, ["longer than the run's 16"]),
        pytest.param(["--evaluation.metric", "acuracy"], {}, ["did you mean 'accuracy'"], marks=SLOW),
        pytest.param(["--run.device", "cuda"], {}, ["finds no CUDA device"], marks=SLOW),
        (["--optim.no_decay", "[nothing*]"], {}, ["'nothing*', which matches no parameter"]),
        ([], {"TINY_NAN": "1"}, ["gradient of step 1 is not finite", "loss nan"]),
    ],
)
def test_mistakes_on_two_ranks_are_told_once_and_nothing_hangs(
    cli: Cli, s3: S3Server, settings: list[str], variables: dict[str, str], parts: list[str]
) -> None:
    began = time.monotonic()
    done = cli(*TRAIN, "--nproc", "2", *settings, **variables)
    assert_one_sentence(done, *parts)
    assert time.monotonic() - began < 30


def write_digits(folder: Path, labels: dict[str, str] | None = None) -> str:
    """A copy of the digits with some labels replaced."""
    build("digits", str(folder))
    if labels is not None:
        import numpy as np

        from dltrain.data.dataset import open_dataset

        dataset = open_dataset(str(folder / "train"))
        with ShardWriter(str(folder / "changed"), samples_per_shard=128) as writer:
            for shard, size in enumerate(dataset.shard_sizes):
                for sample in dataset.read(np.full(size, shard), np.arange(size)):
                    fields = {name: bytes(data) for name, data in sample.fields.items()}
                    if sample.key in labels:
                        fields["cls"] = labels[sample.key].encode()
                    writer.write(sample.key, fields)
        return str(folder / "changed")
    return str(folder / "train")


def test_a_truncated_shard_names_it_and_the_other_rank_ends(cli: Cli, tmp_path: Path) -> None:
    url = write_digits(tmp_path / "d")
    shard = tmp_path / "d" / "train" / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert_one_sentence(cli(*TRAIN, "--nproc", "2", "--data.train", url), "shard-000003.tar is truncated")


def test_a_label_out_of_range_names_its_sample(cli: Cli, tmp_path: Path) -> None:
    url = write_digits(tmp_path / "d", {"0003": "12"})
    words = ["train", "image/classify", "--preset", "digits", "--run.length", "1ep", "--data.train", url]
    assert_one_sentence(cli(*words), "#0003 has label 12", "labels 0 to 9")


@pytest.mark.slow
def test_images_that_are_not_what_the_recipe_says_are_told(cli: Cli) -> None:
    words = ("train", "image/classify", "--preset", "digits", "--run.length", "1ep")
    assert_one_sentence(cli(*words, "--model.size", "12"), "has an image of 8x8 pixels, and model.size is 12")
    assert_one_sentence(cli(*words, "--model.channels", "3"), "has an image of 1 channels; give model.channels 1")


def test_an_empty_data_set_is_refused(cli: Cli, tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "empty")):
        pass
    assert_one_sentence(cli(*TRAIN, "--data.train", str(tmp_path / "empty")), "is empty")


@pytest.mark.slow
def test_a_data_set_changed_before_a_resume_is_refused_and_nothing_is_lost(cli: Cli, tmp_path: Path) -> None:
    url = write_digits(tmp_path / "d")
    assert cli(*TRAIN, "--data.train", url, TINY_DIE="6:SIGTERM").status == 75
    run = tmp_path / "runs" / "bad"
    before = [path.name for path in committed(run / "checkpoints")]
    changed = write_digits(tmp_path / "e", {"0003": "4"})
    assert load_manifest(changed).fingerprint != load_manifest(url).fingerprint
    done = cli(*TRAIN, "--data.train", changed, "--run.resume", "auto")
    assert_one_sentence(done, "data set has changed since the checkpoint")
    assert [path.name for path in committed(run / "checkpoints")] == before
    assert cli(*TRAIN, "--data.train", url, "--run.resume", "auto").status == 0


def test_a_run_that_exists_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TRAIN, "--run.length", "4st").status == 0
    run = tmp_path / "runs" / "bad"
    before = (run / "run.json").read_text()
    assert_one_sentence(cli(*TRAIN), "exists", "--run.resume auto")
    assert (run / "run.json").read_text() == before


@pytest.mark.slow
def test_a_failed_run_says_so_and_keeps_its_checkpoints(cli: Cli, tmp_path: Path) -> None:
    assert cli(*TRAIN, TINY_DIE="6:SIGTERM").status == 75
    run = tmp_path / "runs" / "bad"
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    done = cli(*TRAIN, "--run.resume", "auto", TINY_NAN="1")
    assert_one_sentence(done, "not finite")
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert cli(*TRAIN, "--run.resume", "auto").status == 0


def test_wrong_credentials_are_told(cli: Cli, s3: S3Server) -> None:
    storage.write("s3://data/x", b"")
    variables = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    done = cli(*TRAIN, "--nproc", "2", "--data.train", "s3://data/x", **variables)
    assert_one_sentence(done, "no complete AWS credentials")


def test_a_fault_of_a_recipe_shows_the_traceback_of_the_first_rank(cli: Cli, tmp_path: Path) -> None:
    text = (
        Path(TINY)
        .read_text()
        .replace("return (batch.fields", "raise RuntimeError('mine')\n        return (batch.fields")
    )
    (tmp_path / "broken.py").write_text(text)
    done = cli("train", "broken.py", "--preset", "small", "--nproc", "2")
    assert done.status == 1
    assert done.err.count("Traceback") == 1
    assert "RuntimeError: mine" in done.err
