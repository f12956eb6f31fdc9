"""A run that was interrupted and one that was not are indistinguishable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dltrain.checkpoint.checkpointer import committed
from dltrain.checkpoint.tensors import read_tensors
from tests.conftest import TINY, Cli


def last_tensors(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(committed(run / "checkpoints")[-1])


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs by {(tensor - other[name]).abs().max():.3g}"


def seen(folder: Path) -> dict[int, dict[int, str]]:
    """Position to key of every step, over all ranks; the last word counts where a step was done twice."""
    steps: dict[int, dict[int, str]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        mine: dict[int, dict[int, str]] = {}
        for line in file.read_text().splitlines():
            record = json.loads(line)
            mine[record["step"]] = dict(map(tuple, record["samples"]))
        for step, samples in mine.items():
            steps.setdefault(step, {}).update(samples)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_killed_at_three_steps_and_resumed_on_three_ranks_ends_with_the_same_bits(
    cli: Cli, tmp_path: Path, layout: str
) -> None:
    common = ["train", TINY, "--preset", "small", "--nproc", "3"]
    common += ["--parallel.dp_shard", "3"] if layout == "fsdp" else []
    assert cli(*common, "--run.name", "whole").status == 0
    whole = last_tensors(tmp_path / "runs" / "whole")
    again = [*common, "--run.name", "broken", "--run.resume", "auto"]
    killed = cli(*again, TINY_DIE="6:SIGKILL")
    assert killed.status != 0
    assert "SIGKILL" in killed.err
    stopped = cli(*again, TINY_DIE="9:SIGTERM")
    assert stopped.status == 75, stopped.err
    assert cli(*again, TINY_DIE="15:SIGKILL").status != 0
    resumed = cli(*again)
    assert resumed.status == 0, resumed.err
    assert_same_bits(whole, last_tensors(tmp_path / "runs" / "broken"))
    losses = [
        [
            (r["step"], r["loss"])
            for r in map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").open())
            if "loss" in r
        ]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_then_one_then_three_ranks_see_exactly_the_remaining_samples(cli: Cli, tmp_path: Path) -> None:
    for name in ("whole", "elastic"):
        (tmp_path / name).mkdir()
    train = ["train", TINY, "--preset", "small"]
    assert cli(*train, "--run.name", "whole", TINY_TRACE=str(tmp_path / "whole")).status == 0
    again = [*train, "--run.name", "elastic", "--run.resume", "auto"]
    trace = str(tmp_path / "elastic")
    assert cli(*again, "--nproc", "2", TINY_TRACE=trace, TINY_DIE="5:SIGTERM").status == 75
    stale = tmp_path / "elastic" / "1.jsonl"
    stale.rename(tmp_path / "elastic" / "7.jsonl")
    (tmp_path / "elastic" / "0.jsonl").rename(tmp_path / "elastic" / "6.jsonl")
    assert cli(*again, "--nproc", "1", TINY_TRACE=trace, TINY_DIE="10:SIGTERM").status == 75
    (tmp_path / "elastic" / "0.jsonl").rename(tmp_path / "elastic" / "5.jsonl")
    assert cli(*again, "--nproc", "3", TINY_TRACE=trace).status == 0
    whole, elastic = seen(tmp_path / "whole"), seen(tmp_path / "elastic")
    assert len(whole) == 16
    assert whole == elastic


@pytest.mark.slow
def test_a_changed_batch_size_continues_the_same_sequence(cli: Cli, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.mkdir()
    train = ["train", TINY, "--preset", "small", "--run.name", "changed", "--run.resume", "auto"]
    assert cli(*train, TINY_TRACE=str(trace), TINY_DIE="5:SIGTERM").status == 75
    assert cli(*train, "--data.global_batch_size", "50", TINY_TRACE=str(trace)).status == 0
    positions = sorted(position for samples in seen(trace).values() for position in samples)
    assert positions == list(range(len(positions)))


@pytest.mark.slow
def test_resuming_a_finished_run_trains_no_further(cli: Cli, tmp_path: Path) -> None:
    train = ["train", TINY, "--preset", "small", "--run.length", "4st", "--run.name", "done"]
    first = cli(*train)
    again = cli(*train, "--run.resume", "auto")
    assert (first.status, again.status) == (0, 0)
    assert again.result["step"] == 4
    assert again.result["accuracy"] == first.result["accuracy"]


@pytest.mark.parametrize("number", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_signal_to_the_whole_process_group_saves_and_stops(tmp_path: Path, number: str) -> None:
    """What Ctrl-C on a terminal and a scheduler do: launcher, ranks and loader workers get it all at once."""
    command = [sys.executable, "-m", "dltrain", "train", TINY, "--preset", "small", "--nproc", "2", "--run.name", "x"]
    command += [
        "--run.length",
        "100000st",
        "--data.workers",
        "1",
        "--evaluation.every",
        "0st",
        "--checkpoint.every",
        "0st",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "runs" / "x" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.Signals[number])
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert "Traceback" not in error
    assert "stopped and saved at step" in error
    assert len(committed(tmp_path / "runs" / "x" / "checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_is_broken_off_and_done_when_the_run_goes_on(cli: Cli, tmp_path: Path, ranks: int) -> None:
    """A file appears while the held-out samples are scored, one by one, so that it takes a while."""
    words = ["train", TINY, "--preset", "small", "--nproc", str(ranks), "--run.name", "x", "--run.length", "8st"]
    words += ["--evaluation.batch_size", str(ranks), "--evaluation.every", "4st", "--run.stop_file", "stop"]
    done = cli(*words, TINY_STOP="stop")
    assert done.status == 75, done.err
    assert "stopped and saved at step 4 (run.stop_file stop is there)" in done.err
    assert "evaluation at step 4" not in done.err
    (tmp_path / "stop").unlink()
    again = cli(*words, "--run.resume", "auto")
    assert again.status == 0, again.err
    assert "evaluation at step 4" in again.err
    assert again.err.count("evaluation at step 8") == 1


def test_a_signal_before_training_ends_at_once_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dltrain", "train", TINY, "--preset", "small", "--nproc", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(0.8)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("tail", [pytest.param("drop", marks=pytest.mark.slow), "pad"])
def test_a_run_with_a_ragged_tail_resumes_exactly(cli: Cli, tmp_path: Path, tail: str) -> None:
    settings = ["train", TINY, "--preset", "small", "--run.length", "1.5ep", "--data.tail", tail]
    assert cli(*settings, "--run.name", "whole").status == 0
    again = [*settings, "--run.name", "broken", "--run.resume", "auto"]
    assert cli(*again, TINY_DIE="13:SIGTERM").status == 75  # acted on in the second epoch
    resumed = cli(*again)
    assert resumed.status == 0, resumed.err
    assert_same_bits(last_tensors(tmp_path / "runs" / "whole"), last_tensors(tmp_path / "runs" / "broken"))


@pytest.mark.slow
def test_a_stop_at_an_evaluation_leaves_it_to_the_resumed_run(cli: Cli, tmp_path: Path) -> None:
    settings = ["train", TINY, "--preset", "small", "--run.resume", "auto", "--run.name"]
    assert cli(*settings, "whole").status == 0
    assert cli(*settings, "broken", TINY_DIE="5:SIGTERM").status == 75  # acted on at step 8, where one is due
    assert cli(*settings, "broken").status == 0
    scores = [
        [
            (r["step"], r["evaluation/loss"])
            for r in map(json.loads, (tmp_path / "runs" / n / "metrics.jsonl").open())
            if r["kind"] == "evaluation"
        ]
        for n in ("whole", "broken")
    ]
    assert [step for step, _ in scores[0]] == [8, 16]
    assert scores[0] == scores[1]


def test_ranks_save_and_stop_when_their_launcher_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dltrain", "train", TINY, "--preset", "small", "--nproc", "2", "--run.name", "x"]
    command += ["--run.length", "100000st", "--evaluation.every", "0st", "--checkpoint.every", "0st"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    run, deadline = tmp_path / "runs" / "x", time.monotonic() + 60
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while json.loads((run / "run.json").read_text())["status"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(committed(run / "checkpoints")) == 1
