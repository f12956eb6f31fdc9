"""The hook: what it is shown stands in the events, and nothing that happens to it ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dltrain.config import Config, Data, Length
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.metrics.classification import Classification
from dltrain.task import Task
from dltrain.tensorboard.events import Events
from dltrain.tensorboard.hook import TensorBoard
from tests.conftest import TINY, Cli
from tests.tensorboard.made_up import ALONE, FINDING, counted, read, started, statistics, text, trainer_of, values

NAMES = ["cat", "dog", "owl"]


class Pets(Task):
    """Three classes of images of 6 x 6 pixels."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["image"].float(),)

    def metrics(self) -> Classification:
        return Classification(NAMES, image="image")


class Untraceable(Pets):
    """Its model's forward looks for a file that is not there."""

    def model(self) -> nn.Module:
        class Opens(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                raise FileNotFoundError("no such table")

        return Opens()


def pets(samples: int = 20, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "image": torch.randint(0, 256, (samples, 6, 6), dtype=torch.uint8, generator=generator),
        "cls": torch.randint(0, 3, (samples,), generator=generator),
    }
    return Batch(fields, torch.ones(samples), tuple(f"pet{n}" for n in range(samples)), torch.arange(samples))


def config_of(**sections: Any) -> Config:
    return Config(data=Data(evaluation="elsewhere"), **sections)


def trained(folder: Path, task: Task, model: nn.Module, config: Config) -> TensorBoard:
    """What a run of two steps and an evaluation tells the hook."""
    hook, trainer = TensorBoard(Events(folder), config, ALONE), trainer_of(config, task)
    hook.model_built(model)
    hook.fit_start(trainer)
    batch = pets()
    for step in (1, 2):
        hook.step_start(trainer, batch)
        trainer.step = step
        hook.step_end(trainer)
        hook.logged(
            trainer, {"step": step, "epoch": step / 2, "loss": 1.0 / step, "learning_rate": 0.1, "grad_norm": 2.0}
        )
    hook.evaluation_start(trainer)
    model.eval()
    logits, losses = model(batch.fields["image"].float()), torch.arange(20.0)
    trainer.last_metric = task.metrics()
    trainer.last_metric.update(logits, losses, batch)
    hook.evaluation_batch(trainer, batch, logits, losses)
    scores = trainer.last_metric.compute()
    hook.evaluation_end(trainer, {"step": 2, **{f"evaluation/{name}": value for name, value in scores.items()}})
    hook.fit_end(trainer)
    hook.close()
    return hook


@pytest.fixture
def task() -> Pets:
    task = Pets(config_of())
    task.facts = {"classes": NAMES}
    return task


def test_a_run_fills_the_tabs(tmp_path: Path, task: Pets) -> None:
    no_report = config_of().replace(evaluation=config_of().evaluation.replace(report=False, metric="accuracy"))
    assert not trained(tmp_path, task, task.model(), no_report).failed
    events = read(tmp_path)
    tags = events.Tags()
    assert values(events, "loss/train") == [(1, 1.0), (2, 0.5)]
    assert {"optimizer/learning_rate", "optimizer/gradient_norm", "progress/epoch", "loss/evaluation"} <= set(
        tags["scalars"]
    )
    assert "evaluation/accuracy" in tags["scalars"]
    assert {"inputs/image", "evaluation/confusion_matrix", "evaluation/mistakes"} <= set(tags["images"])
    assert tags["graph"]
    assert {f"precision and recall/{name}" for name in ("all classes", *NAMES)} <= set(tags["tensors"])
    assert "learning_rate: 0.001" in text(events, "config")
    kinds = {data.plugin_data.plugin_name for data in events.summary_metadata.values()}
    assert {"text", "pr_curves", "custom_scalars", "hparams"} <= kinds
    rows = (tmp_path / "projector" / "samples.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["label", "predicted", "key", "loss"]
    labels = [NAMES[int(number)] for number in pets().fields["cls"]]
    assert [row.split("\t")[0] for row in rows[1:]] == labels
    assert np.loadtxt(tmp_path / "projector" / "features.tsv").shape == (20, 5)


def test_pictures_of_the_report_are_taken_over(tmp_path: Path) -> None:
    hook = started(tmp_path / "events")
    metric = Classification(NAMES)
    metric.update(
        torch.eye(3), torch.zeros(3), Batch({"cls": torch.arange(3)}, torch.ones(3), ("a", "b", "c"), torch.arange(3))
    )
    metric.report(tmp_path, [])
    hook.report_written(7, tmp_path)
    hook.close()
    assert [each.step for each in read(tmp_path / "events").Images("evaluation/confusion_matrix")] == [7]


def test_a_model_that_cannot_be_traced_is_told_once_and_no_more_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: Pets
) -> None:
    hook = trained(tmp_path, Untraceable(config_of()), task.model(), config_of())
    assert not hook.failed
    told = capsys.readouterr()
    assert told.err.count("TensorBoard has no graph of the model: FileNotFoundError while Untraceable.model()") == 1
    assert "no such table" in told.err
    assert not told.out
    events = read(tmp_path)
    assert not events.Tags()["graph"]
    assert "no such table" in text(events, "graph")
    assert values(events, "loss/train")[-1] == (2, 0.5)


def test_a_model_in_shards_has_no_graph_and_says_so_in_the_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: Pets
) -> None:
    hook, trainer = TensorBoard(Events(tmp_path), config_of(), ALONE), trainer_of(config_of(), task)
    trainer.engine.mesh.is_sharded = True
    hook.fit_start(trainer)
    hook.step_start(trainer, pets())
    hook.step_end(trainer)
    hook.close()
    events = read(tmp_path)
    assert not events.Tags()["graph"]
    assert "not whole on one rank" in text(events, "graph")
    assert "inputs/image" in events.Tags()["images"]
    assert not capsys.readouterr().err


def test_the_graph_draws_no_random_numbers(tmp_path: Path, task: Pets) -> None:
    hook, trainer = TensorBoard(Events(tmp_path), config_of(), ALONE), trainer_of(config_of(), task)
    hook.fit_start(trainer)
    torch.manual_seed(5)
    hook.step_start(trainer, pets())
    hook.step_end(trainer)
    hook.close()
    after = torch.rand(3)
    torch.manual_seed(5)
    assert after.tolist() == torch.rand(3).tolist()
    assert read(tmp_path).Tags()["graph"]


def test_statistics_are_one_number_of_each_layer(tmp_path: Path) -> None:
    hook = started(tmp_path, every=Length.parse("1st"))
    tensors = statistics(3)
    hook.statistics(3, tensors)
    hook.close()
    events = read(tmp_path)
    names, sizes = tensors.reduced("gradients", "abs_mean")
    for name, size in zip(names, sizes, strict=True):
        layer = name.removeprefix("gradient/")
        assert values(events, f"tensors_gradients_abs_mean/{layer}") == [(3, pytest.approx(size))]
        assert values(events, f"tensors_update_ratio/{layer}") == [(3, pytest.approx(1e-3 / 4))]
    assert values(events, "tensors_nonfinite/gradients") == [(3, 0.0)]
    assert {"tensors_activations_std/blocks.0.act", "tensors_active_mean/blocks.0.act"} <= set(events.Tags()["scalars"])


def test_many_tensors_are_shown_by_module(tmp_path: Path) -> None:
    hook = started(tmp_path)
    tensors = statistics(1, layers=40)
    hook.statistics(1, tensors)
    hook.close()
    events = read(tmp_path)
    shown = [tag for tag in events.Tags()["scalars"] if tag.startswith("tensors_weights_l2/")]
    assert len(shown) == 40
    norms = dict(zip(*tensors.reduced("weights", "l2"), strict=True))
    whole = np.hypot(norms["blocks.7.weight"], norms["blocks.7.bias"])
    assert values(events, "tensors_weights_l2/blocks.7") == [(1, pytest.approx(whole))]


def test_histograms_keep_counts_and_range(tmp_path: Path) -> None:
    hook = started(tmp_path)
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([numbers, torch.tensor([float("nan")])])
    hook.histograms(2, {"gradient/head.weight": counted(numbers), "head.weight": counted(broken)})
    hook.close()
    events = read(tmp_path)
    (gradient,) = events.Histograms("tensors_gradients/head.weight")
    (weight,) = events.Histograms("tensors_weights/head.weight")
    assert gradient.step == 2
    for seen, precision in ((gradient.histogram_value, 1e-6), (weight.histogram_value, 0.25)):  # a bin's width
        assert sum(seen.bucket) == 1000
        assert seen.min == pytest.approx(float(numbers.min()), rel=precision)
        assert seen.max == pytest.approx(float(numbers.max()), rel=precision)
    assert np.isfinite([*weight.histogram_value.bucket_limit]).all()
    assert gradient.histogram_value.sum == pytest.approx(float(numbers.sum()), rel=1e-5)


def test_a_finding_is_text(tmp_path: Path) -> None:
    hook = started(tmp_path)
    hook.finding(FINDING)
    hook.close()
    told = text(read(tmp_path), "findings/VanishingGradient")
    for part in (
        FINDING.what,
        "step 40",
        FINDING.why,
        FINDING.advice,
        "- `gradient/head.weight`",
        "| mean size | 3e-09 |",
    ):
        assert part in told


def test_a_resumed_run_hides_the_steps_that_it_does_again(tmp_path: Path) -> None:
    for start, steps, value in ((0, range(1, 9), 1.0), (4, range(5, 7), 2.0)):
        hook = started(tmp_path, step=start)
        for step in steps:
            hook.logged(trainer_of(Config()), {"step": step, "loss": value})
        hook.close()
    seen = values(read(tmp_path), "loss/train")
    assert seen == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]


def test_a_full_disk_is_told_once_and_ends_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = started(small_disk / "events")
    for step in range(200):
        hook.histograms(step, {"head.weight": counted(torch.randn(5000))})
    hook.finding(FINDING)
    hook.close()
    assert hook.failed
    told = capsys.readouterr().err
    assert told.count("warning:") == told.count("cannot write TensorBoard's events") == 1
    assert "No space left on device" in told
    assert "the run goes on without them" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_that_is_a_file_is_told_once_or_ends_a_strict_run(
    tmp_path: Path, strict: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("")
    if strict:
        with pytest.raises(UserError, match=r"taken: .*set debugger.strict false or logging.tensorboard false"):
            started(tmp_path / "taken", strict=True)
        return
    hook = started(tmp_path / "taken")
    hook.logged(trainer_of(Config()), {"step": 1, "loss": 1.0})
    hook.finding(FINDING)
    hook.close()
    assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.slow
def test_training_is_the_same_to_the_last_bit(cli: Cli, tmp_path: Path) -> None:
    losses = {}
    for shown in ("true", "false"):
        words = ("--nproc", "2", "--logging.tensorboard", shown, "--run.name", shown, "--evaluation.report", "true")
        done = cli("train", TINY, "--preset", "small", *words)
        assert done.status == 0, done.err
        assert "warning" not in done.err
        lines = map(json.loads, (tmp_path / "runs" / shown / "metrics.jsonl").read_text().splitlines())
        losses[shown] = [(line["step"], line.get("loss", line.get("evaluation/loss"))) for line in lines]
    assert losses["true"] == losses["false"]
    assert (tmp_path / "runs/true/tensorboard/projector/features.tsv").exists()
    assert not (tmp_path / "runs/false/tensorboard").exists()
