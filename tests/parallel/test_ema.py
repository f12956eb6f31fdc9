"""The average of the weights: the formula, under every layout, in checkpoints, and in place of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dltrain.checkpoint.checkpointer import Checkpointer, step_folder
from dltrain.config import Config, load_overrides
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plain import PlainEngine
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.conftest import TINY, Cli
from tests.parallel.matrix import LAYOUTS, STEPS, build, share_of, whole
from tests.parallel.test_engine import Normed, Regression, engine_for
from tests.parallel.test_engine import share_of as rows_of

# AdamW makes steps of full size of the rounding of gradients that are 0 (keys' biases), unless eps outweighs it
EMA = {"optim.ema": 0.7, "optim.ema_warmup": True, "optim.eps": 1e-3}


def decay(update: int, most: float, warmup: bool) -> float:
    """Of the n-th update, from 1: timm's ``ModelEmaV3`` with its defaults, whose step is n - 1."""
    return min(most, 1 - (1 + (update - 1) / 1.0) ** -(2 / 3)) if warmup else most


def explicit(weights: list[Tensor], most: float, warmup: bool) -> Tensor:
    """The sum over all steps, written out: w_0 first, with what no later decay takes from each."""
    shares = [1.0] + [1 - decay(n, most, warmup) for n in range(1, len(weights))]
    total = torch.zeros_like(weights[0], dtype=torch.float64)
    for n, weight in enumerate(weights):
        left = torch.tensor([decay(later, most, warmup) for later in range(n + 1, len(weights))], dtype=torch.float64)
        total += shares[n] * left.prod() * weight.double()
    return total


def snapshot(engine: PlainEngine) -> dict[str, Tensor]:
    tensors = {**dict(engine.model.named_parameters()), **dict(engine.model.named_buffers())}
    return {name: value.detach().clone() for name, value in tensors.items()}


def step(engine: Any, number: int, poison: bool = False) -> None:
    batch = rows_of(number, 0, 1)
    if poison:
        batch.fields["x"][0, 0] = float("nan")
    engine.forward_backward(batch, torch.tensor(10.0))
    engine.step(0.01, 0.5)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_sum_of_all_weights_by_their_shares(warmup: bool) -> None:
    """Of running statistics too; whole numbers (batches seen) are not averaged; a skipped step counts nothing."""
    engine = engine_for(0, 1, {"optim.ema": 0.9, "optim.ema_warmup": warmup, "run.nonfinite": "skip"}, Normed)
    seen = [snapshot(engine)]
    for number in range(8):
        step(engine, number, poison=number == 3)
        if number != 3:
            seen.append(snapshot(engine))
    found = engine.state_dict()["ema"]["weights"]
    assert found.keys() == {name for name in seen[0] if "num_batches" not in name}
    assert {"1.0.running_mean", "1.0.running_var"} <= found.keys()
    for name, average in found.items():
        torch.testing.assert_close(average.double(), explicit([s[name] for s in seen], 0.9, warmup), atol=1e-6, rtol=0)


def test_frozen_parameters_are_left_out() -> None:
    class HalfFrozen(Regression):
        def model(self) -> nn.Module:
            model = super().model()
            model[0].requires_grad_(False)  # type: ignore[index]
            return model

    engine = engine_for(0, 1, EMA, HalfFrozen)
    assert not {"0.weight", "0.bias"} & engine.state_dict()["ema"]["weights"].keys()
    step(engine, 0)
    with engine.averaged():
        assert engine.evaluate(rows_of(1, 0, 1))[1].isfinite().all()


class Seen(NamedTuple):
    """Losses of the steps; the average at the end; losses of held-out samples under it in the middle and at the end."""

    losses: list[float]
    average: dict[str, Tensor]
    middle: list[float]
    end: list[float]


def averaging(rank: int, ranks: int, overrides: dict[str, Any], evaluating: bool = True) -> Seen:
    _, mesh, engine = build("vit", rank, ranks, {**EMA, **overrides})
    losses, middle = [], []
    for number in range(STEPS):
        batch = share_of("vit", number, mesh.data_rank, mesh.data_ranks)
        losses.append(engine.forward_backward(batch, torch.tensor(10.0)).sum.item())
        engine.step(0.003, 1.0)
        if evaluating and number == 4:
            middle = score(engine)
    return Seen(losses, average_of(engine), middle, score(engine))


def score(engine: Any) -> list[float]:
    """Under the average; the weights are the same bits before and after, and after an error too."""
    before = whole(engine)
    with engine.averaged():
        losses = engine.evaluate(share_of("vit", STEPS, 0, 1))[1].tolist()
    with pytest.raises(ZeroDivisionError):
        fail_midway(engine)
    after = whole(engine)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return losses


def fail_midway(engine: Any) -> None:
    with engine.averaged():
        engine.evaluate(share_of("vit", STEPS, 0, 1))
        raise ZeroDivisionError


def average_of(engine: Any) -> dict[str, Tensor]:
    return whole_of(engine.state_dict()["ema"]["weights"])


def whole_of(tensors: dict[str, Any]) -> dict[str, Tensor]:
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    return {name: value.detach().clone() for name, value in full.items()}


@pytest.fixture(scope="module")
def alone() -> Seen:
    seen: Seen = run_ranks(averaging, 1, 1, {})[0]
    return seen


QUICK = ["fsdp 2", "tp 2", "pp 2, 1f1b"]
SLOW = ["ddp 2", "zero-2, 2", "hsdp 2x2", "fsdp 2 x tp 2", "pp 2 x fsdp 2, zb-v", "pp 2 x tp 2"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layout_has_the_average_of_one_process_and_evaluates_it(name: str, alone: Seen) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(averaging, layout.ranks, layout.ranks, layout.overrides)
    together = {name: value for each in found for name, value in each.average.items()}
    assert together.keys() == alone.average.keys()
    for parameter, value in together.items():
        torch.testing.assert_close(value, alone.average[parameter], atol=1e-5, rtol=0)
    for each in found:
        for mine, expected in ((each.middle, alone.middle), (each.end, alone.end)):
            assert not mine or mine == pytest.approx(expected, abs=1e-4)
    assert any(each.end for each in found)


def test_evaluating_the_average_changes_no_later_step(alone: Seen) -> None:
    """Under FSDP2, where gathered weights outlive an evaluation."""
    undisturbed = run_ranks(averaging, 2, 2, {"parallel.dp_shard": 2}, False)
    assert [seen.losses for seen in run_ranks(averaging, 2, 2, {"parallel.dp_shard": 2})] == [
        seen.losses for seen in undisturbed
    ]


def test_the_average_is_not_the_weights(alone: Seen) -> None:
    plain = run_ranks(last_scores, 1)[0]
    assert alone.end != pytest.approx(plain, abs=1e-3)


def last_scores(rank: int) -> list[float]:
    _, _, engine = build("vit", 0, 1, {})
    for number in range(STEPS):
        engine.forward_backward(share_of("vit", number, 0, 1), torch.tensor(10.0))
        engine.step(0.003, 1.0)
    with engine.averaged():  # without an average, the weights themselves
        losses: list[float] = engine.evaluate(share_of("vit", STEPS, 0, 1))[1].tolist()
    return losses


def goes_on(rank: int, ranks: int, overrides: dict[str, Any], folder: str, stop: int) -> dict[str, Tensor]:
    """From a checkpoint in ``folder``, if there is one, to the step ``stop``, saved there; the average."""
    _, mesh, engine = build("vit", rank, ranks, {**EMA, **overrides})
    checkpoints, start = Checkpointer(Path(folder), 3, mesh.environment), 0
    if (latest := checkpoints.latest()) is not None:
        start = checkpoints.load(latest, engine)["step"]
    for number in range(start, stop):
        engine.forward_backward(share_of("vit", number, mesh.data_rank, mesh.data_ranks), torch.tensor(10.0))
        engine.step(0.003, 1.0)
    checkpoints.save(stop, engine, {"step": stop})
    return average_of(engine)


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp 2", "fsdp 2"), ("fsdp 2", "pp 2, 1f1b"), pytest.param("tp 2", "fsdp 2", marks=pytest.mark.slow)],
)
def test_the_average_goes_on_from_a_checkpoint(before: str, after: str, alone: Seen, tmp_path: Path) -> None:
    first, second = LAYOUTS[before], LAYOUTS[after]
    run_ranks(goes_on, first.ranks, first.ranks, first.overrides, str(tmp_path / "a"), 5)
    found = run_ranks(goes_on, second.ranks, second.ranks, second.overrides, str(tmp_path / "a"), STEPS)
    for each in found:
        for name, value in each.items():
            torch.testing.assert_close(value, alone.average[name], atol=1e-5, rtol=0)
    if before == after:
        straight = run_ranks(goes_on, first.ranks, first.ranks, first.overrides, str(tmp_path / "b"), STEPS)
        assert all(torch.equal(value, straight[0][name]) for name, value in found[0].items())


def engine_with(ema: float) -> PlainEngine:
    config = load_overrides(Config(), {"optim.ema": ema})
    return parallelize(Regression(config), config, build_mesh(config.parallel, Environment(), CPU), CPU)


CPU = torch.device("cpu")


def test_a_checkpoint_of_one_kind_goes_on_as_the_other_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpointer(tmp_path, 3, Environment())
    for number, (before, after, words) in enumerate(
        [(0.0, 0.9, "has no averaged weights: the average"), (0.9, 0.0, "which are left aside: optim.ema is 0")]
    ):
        trained, other = engine_with(before), engine_with(after)
        step(trained, 0)
        checkpoints.save(number, trained, {})
        checkpoints.load(step_folder(tmp_path, number), other)
        assert words in capsys.readouterr().err
        for (name, one), (_, two) in zip(trained.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(one, two)
            if after:
                assert torch.equal(other.state_dict()["ema"]["weights"][name], two)


@pytest.mark.slow
def test_a_run_scores_its_average_and_eval_does_too(cli: Cli, tmp_path: Path) -> None:
    words = ("train", TINY, "--preset", "small", "--optim.ema", "0.8", "--nproc", "2", "--parallel.dp_shard", "2")
    done = cli(*words, "--run.name", "mine", "--evaluation.report", "true")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "runs/mine/report/evaluation.json").read_text())
    assert report["weights"] == "averaged, optim.ema 0.8"
    lines = map(json.loads, (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["evaluation/loss"] for line in lines if line["kind"] == "evaluation"}
    again = cli("eval", "mine", "--parallel.dp_shard", "1")
    assert again.status == 0, again.err
    expected = losses[int(Path(again.result["checkpoint"]).name.removeprefix("step-"))]
    assert again.result["loss"] == pytest.approx(expected, abs=1e-5)
    plain = cli("eval", "mine", "--parallel.dp_shard", "1", "--optim.ema", "0")
    assert "which are left aside" in plain.err
    assert plain.result["loss"] != pytest.approx(expected, abs=1e-4)
