"""A run with the profiler on: traces, tables, timelines and utilisation are those of the chosen steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dltrain.config import Config, Profiler
from dltrain.data.batch import Batch
from dltrain.debugger.run import open_run
from dltrain.profiling.utilisation import flops_of, peak_of
from dltrain.runtime.step_clock import PARTS
from dltrain.task import Task
from tests.conftest import TINY, Cli

SMALL = ("train", TINY, "--preset", "small")


def test_steps_are_traced_and_timed(cli: Cli, tmp_path: Path) -> None:
    words = ("--profiler.trace", "3,4", "--profiler.ranks", "0,1", "--profiler.every", "4st")
    done = cli(*SMALL, *words, "--nproc", "2", "--profiler.flops", "true", "--profiler.peak_tflops", "0.001")
    assert done.status == 0, done.err
    folder = tmp_path / done.result["run"]
    for rank in (0, 1):
        name = f"debugger/trace/steps-3-4-rank-{rank}"
        trace = json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))
        assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])
        assert "aten::" in (folder / f"{name}.txt").read_text()
        summary = json.loads((folder / f"{name}.summary.json").read_text())
        assert summary["steps"] == 2
        assert summary["communication"] > 0
        assert summary["compute"] + summary["exposed"] + summary["copying"] + summary["idle"] == pytest.approx(
            summary["total"]
        )
    timelines = [value for _, value in open_run(str(folder)).observations("timeline")]
    assert [each["of"] for each in timelines] == [1, 4, 8, 12]
    assert timelines[0]["seconds"].keys() == set(PARTS)
    assert all(min(each["seconds"][part]) > 0 for each in timelines for part in ("forward", "backward", "optimizer"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    # 2 x (64 x 16 + 16 x 10) of a forward pass, and twice that of the backward pass, on each of two ranks
    assert steps[3]["tflops"] == pytest.approx(6 * (64 * 16 + 16 * 10) * steps[3]["samples_per_second"] / 2 / 1e12)
    assert steps[3]["mfu"] == pytest.approx(steps[3]["tflops"] / 0.001)


class Layers(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["image"],)


def test_flops_are_those_of_products() -> None:
    batch = Batch({"image": torch.zeros(4, 3, 4, 4)}, torch.ones(4), ("",) * 4, torch.arange(4))
    convolution, linear = 16 * 8 * 3 * 9, 8 * 16 * 5  # multiplications, each with an addition
    assert flops_of(Layers(Config()), Config(), batch) == 3 * 2 * (convolution + linear)


def test_a_peak_is_the_users_or_unknown() -> None:
    assert peak_of(torch.device("cpu"), Config()) == 0
    assert peak_of(torch.device("cpu"), Config(profiler=Profiler(peak_tflops=2.0))) == 2e12


@pytest.mark.slow
def test_snapshots_without_cuda_are_told(cli: Cli) -> None:
    done = cli(*SMALL, "--profiler.memory", "3", "--run.length", "4st")
    assert done.status == 0, done.err
    assert "warning: profiler.memory: snapshots are of CUDA's memory, and this is cpu" in done.err


@pytest.mark.slow
def test_stages_that_wait_for_each_other_are_timed(cli: Cli, tmp_path: Path) -> None:
    words = ("image/classify", "--preset", "vit-tiny", "--nproc", "2", "--parallel.pp", "2", "--run.length", "12st")
    done = cli("train", *words, "--schedule.warmup", "2st", "--profiler.every", "4st")
    assert done.status == 0, done.err
    timelines = [value for _, value in open_run(str(tmp_path / done.result["run"])).observations("timeline")]
    assert [each["of"] for each in timelines] == [1, 4, 8]
    # 1F1B with 2 ranks and 4 pieces waits in (2 - 1) / (4 + 2 - 1) of its time
    assert all(each["bubble"] == pytest.approx(0.2) and max(each["seconds"]["pipeline"]) > 0 for each in timelines)
