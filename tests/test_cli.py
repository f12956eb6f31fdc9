"""The command line: fast, and each command does what its line of help says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dltrain.config import from_yaml
from dltrain.recipes import declarations
from tests.conftest import ROOT, TINY, Cli

SLOWNESS = float(os.environ.get("DLTRAIN_TEST_SLOWNESS", "2"))
"""Limits in seconds are for a quiet machine; a shared one may take this many times as long."""


def fastest(command: list[str], tries: int = 3) -> float:
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def test_importing_the_package_is_quick_and_imports_no_torch() -> None:
    code = "import sys, dltrain, dltrain.config, dltrain.recipes, dltrain.cli.train; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    empty = fastest([sys.executable, "-c", ""])
    assert fastest([sys.executable, "-c", "import dltrain"]) - empty < 0.3 * SLOWNESS


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "image/classify", "--help"], ["recipe", "ls"]]
)
def test_help_answers_at_once(words: list[str]) -> None:
    assert fastest([sys.executable, "-m", "dltrain", *words]) < 0.5 * SLOWNESS


def test_help_lists_sections_documentation_and_defaults(cli: Cli) -> None:
    text = cli("train", "image/classify", "--preset", "digits", "--help").out
    assert "optim: The optimizer" in text
    assert "--optim.learning_rate FLOAT [0.004]" in text
    assert "--model.classes INT [10]\n      Number of classes" in text
    assert "digits: 1,797 scans" in text
    top = cli("--help").out
    assert all(f"  {name}" in top for name in ("train", "eval", "recipe", "runs", "shards", "optim", "evaluation"))


def test_every_public_name_can_be_imported() -> None:
    code = "import dltrain; [getattr(dltrain, name) for name in dltrain.__all__]"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_recipes_are_listed_shown_and_copied_to_run_unchanged(cli: Cli, tmp_path: Path) -> None:
    assert "image/classify: Image classification" in cli("recipe", "ls").out
    source = (ROOT / "recipes/image/classify.py").read_text()
    assert cli("recipe", "show", "image/classify").out == source
    assert cli("recipe", "cp", "image/classify", "mine.py").status == 0
    assert (tmp_path / "mine.py").read_text() == source
    words = ("--run.length", "1ep", "--data.workers", "1", "--evaluation.report", "false")
    done = cli("train", "mine.py", "--preset", "digits", *words)
    assert done.status == 0, done.err
    assert cli("recipe", "cp", "image/classify", "mine.py").status == 2


@pytest.mark.slow
def test_torchrun_of_the_recipe_is_the_same_job(cli: Cli, tmp_path: Path) -> None:
    settings = ["--preset", "digits", "--run.length", "2ep", "--logging.every", "1st", "--evaluation.report", "false"]
    settings += ["--run.name"]
    assert cli("train", "image/classify", "--nproc", "2", *settings, "ours").status == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "recipes/image/classify.py"), *settings, "theirs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [
        [
            (r["step"], r["loss"])
            for r in map(json.loads, (tmp_path / f"runs/{name}/metrics.jsonl").open())
            if "loss" in r
        ]
        for name in ("ours", "theirs")
    ]
    assert len(records[0]) == 45
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run of the digits on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "dltrain", "train", "image/classify", "--preset", "digits", "--nproc", "2"]
    subprocess.run(
        [*command, "--run.length", "3ep", "--run.name", "short"], cwd=folder, check=True, capture_output=True
    )
    return folder / "runs" / "short"


def test_a_run_has_the_layout_of_the_documentation(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["versions"]["torch"]
    assert (record["world_size"], record["recipe"], record["preset"]) == (2, "image/classify", "digits")
    kind = declarations("image/classify").config
    assert from_yaml(kind, (run / "config.yaml").read_text()).model_dump(mode="json") == record["config"]
    kinds = {json.loads(line)["kind"] for line in (run / "metrics.jsonl").open()}
    assert kinds == {"step", "evaluation"}
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl", "recipe.py", "report", "run.json", "tensorboard",
    ]  # fmt: skip


def test_tensorboard_shows_scalars_text_images_and_hparams(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    wanted = {"loss/train", "loss/evaluation", "evaluation/accuracy", "optimizer/learning_rate"}
    assert wanted | {"optimizer/gradient_norm", "speed/samples_per_second", "speed/data_wait"} <= set(tags["scalars"])
    assert {"inputs/image", "evaluation/confusion_matrix"} <= set(tags["images"])
    assert {"config/text_summary", "precision and recall/7", "custom_scalars__config__"} <= set(tags["tensors"])
    assert tags["graph"]
    assert len((run / "tensorboard/projector/samples.tsv").read_text().splitlines()) == 181  # half of 360, and a head
    assert any("_hparams_" in tag for tag in [*tags["tensors"], *events.summary_metadata])


@pytest.mark.parametrize("ranks", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_eval_counts_every_sample_once_on_any_number_of_ranks(cli: Cli, run: Path, ranks: str) -> None:
    done = cli("eval", str(run), "--nproc", ranks)
    assert done.status == 0, done.err
    report = json.loads((run / "report" / "evaluation.json").read_text())
    assert sum(map(sum, report["confusion"])) == report["scores"]["samples"] == 360
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert report["scores"]["accuracy"] == best["value"]
    page = (run / "report" / "evaluation.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert (run / "report" / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_listed(cli: Cli, run: Path) -> None:
    text = cli("runs", "ls", "--folder", str(run.parent)).out
    assert re.search(r"short +image/classify digits +finished +68 ", text)
    assert "accuracy 0." in text


@pytest.mark.slow
def test_the_same_command_runs_twice_and_auto_goes_on_with_the_unfinished_one(cli: Cli, tmp_path: Path) -> None:
    train = ["train", TINY, "--preset", "small"]
    assert cli(*train, "--run.length", "4st").status == 0
    assert cli(*train, TINY_DIE="6:SIGTERM").status == 75
    assert cli(*train, "--run.length", "4st").status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3
    resumed = cli(*train, "--run.resume", "auto")
    assert resumed.status == 0, resumed.err
    assert "resumed at step" in resumed.err
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.slow
def test_forecasting_beats_seasonal_naive(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", "timeseries/forecast", "--preset", "co2", "--run.name", "co2")
    assert done.status == 0, done.err
    assert done.result["mase"] < 0.6 < done.result["naive_mase"]
    assert done.result["samples"] == 157  # 208 held-out weeks hold 208 - 52 + 1 windows of a year ahead
    assert (tmp_path / "runs/co2/report/forecasts.png").is_file()


def test_shards_are_built_listed_and_verified(cli: Cli, tmp_path: Path) -> None:
    assert "wrote 1437 samples" in cli("shards", "build", "digits", "d").out
    assert "1437 samples in 12 shards" in cli("shards", "ls", "d/train").out
    assert "are whole" in cli("shards", "verify", "d/train").out
    shard = tmp_path / "d/train/shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    damaged = cli("shards", "verify", "d/train")
    assert damaged.status == 2
    assert "shard-000002.tar" in damaged.err
