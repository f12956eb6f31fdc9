"""fp16: near fp32 under every layout, a loss scale as GradScaler's, overflow that is no error, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dltrain.checkpoint.checkpointer import Checkpointer
from dltrain.errors import UserError
from dltrain.hooks.base import Hook
from dltrain.parallel import scaling
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.scaling import LossScale
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import LAYOUTS, Trained, build, train
from tests.parallel.matrix import share_of as images_of
from tests.parallel.test_engine import Normed, engine_for, share_of
from tests.test_trainer import trainer, url

__all__ = ["url"]  # a fixture

FP16 = {"precision.compute": "fp16"}

COUNT = torch.tensor(1000.0)
"""So large that nothing overflows unless it is made to."""


def test_the_scale_changes_as_that_of_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side over steps of which some overflow, with a growth interval of 3."""
    usual = torch.amp.GradScaler("cpu")
    assert (usual.get_scale(), usual.get_growth_interval()) == (scaling.INITIAL, scaling.INTERVAL)
    assert (usual.get_growth_factor(), usual.get_backoff_factor()) == (scaling.GROWTH, scaling.BACKOFF)
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    seen = []
    for overflows in (0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0):
        theirs.scale(weight.sum())
        weight.grad = torch.full((2,), float("inf") if overflows else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflows)))
        seen.append(ours.value.item())
        assert seen[-1] == theirs.get_scale()
    assert len(set(seen)) > 2


@pytest.fixture(scope="module")
def alone() -> Trained:
    trained: Trained = run_ranks(train, 1, 1, "vit", {})[0]
    return trained


SLOW = ["hsdp 2x2", "tp 2", "fsdp 2 x tp 2", "pp 2, zb-v", "pp 2 x fsdp 2, zb-v"]


@pytest.mark.parametrize(
    "name", ["ddp 2", "fsdp 2", "pp 2, 1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_fp16_stays_near_fp32(name: str, alone: Trained) -> None:
    """Norms too, which are those of unscaled gradients; clipping sees them."""
    layout = LAYOUTS[name]
    assert max(alone.norms) > 1.0  # something was clipped
    for found in run_ranks(train, layout.ranks, layout.ranks, "vit", {**layout.overrides, **FP16}):
        assert found.losses == pytest.approx(alone.losses, abs=1e-2)
        assert found.losses != alone.losses
        assert found.norms == pytest.approx(alone.norms, rel=2e-2)
        assert all(weight.dtype == torch.float32 for weight in found.weights.values())


def gradient(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[float, float]:
    """The norm that hooks see between the passes and the step, and the step's."""
    _, mesh, engine = build("vit", rank, ranks, overrides)
    engine.forward_backward(images_of("vit", 0, mesh.data_rank, mesh.data_ranks), torch.tensor(10.0))
    whole = [value.square().sum() for _, value in engine.gradients()]
    return torch.stack(whole).sum().sqrt().item(), engine.step(0.003, 0.0).item()


def test_gradients_are_unscaled_when_hooks_see_them() -> None:
    for seen, stepped in run_ranks(gradient, 2, 2, {**FP16, "parallel.dp_shard": 2}):
        assert seen == pytest.approx(stepped, rel=1e-5)


def overflowing(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[list[float], bool, bool]:
    """Scales after each of three steps, the second with a sample of the last rank that overflows; whether weights were
    left alone then, and running statistics stayed finite."""
    engine = engine_for(rank, ranks, {**FP16, **overrides}, Normed)
    scales = []
    for number in range(3):
        batch = share_of(number, rank, ranks)
        if number == 1 and rank == ranks - 1:
            batch.fields["y"][0] = 3e38
            batch.fields["mask"][0] = 1
        before = [value.detach().clone() for _, value in engine.named_parameters()]
        engine.forward_backward(batch, COUNT)
        engine.step(0.01, 0.5)
        same = all(torch.equal(old, new) for old, (_, new) in zip(before, engine.named_parameters(), strict=True))
        scales.append((engine.loss_scale.item(), same))  # type: ignore[union-attr]
    finite = all(bool(buffer.isfinite().all()) for buffer in engine.model.buffers())
    return [scale for scale, _ in scales], [same for _, same in scales] == [False, True, False], finite


@pytest.mark.parametrize("overrides", [{}, {"parallel.dp_shard": 2}], ids=["ddp", "fsdp"])
def test_overflow_on_one_rank_is_everyones(overrides: dict[str, Any]) -> None:
    for scales, left_alone, finite in run_ranks(overflowing, 2, 2, overrides):
        assert scales == [2.0**16, 2.0**15, 2.0**15]
        assert left_alone
        assert finite


class Overflow(Hook):
    """Makes the gradient of some steps overflow, and notes the scales that are logged."""

    def __init__(self, steps: range) -> None:
        self.steps, self.scales = steps, []

    def gradients_ready(self, trainer: Any) -> None:
        if trainer.step in self.steps:
            next(trainer.engine.model.parameters()).grad[0] = float("inf")

    def logged(self, trainer: Any, record: dict[str, Any]) -> None:
        self.scales.append(record["loss_scale"])


def test_overflow_is_no_error_of_the_users_until_the_scale_has_vanished(url: str) -> None:
    hook = Overflow(range(2, 4))
    assert trainer(url, hook, evaluate=False, precision__compute="fp16").fit() == "finished"
    assert hook.scales == [2.0**16] * 2 + [2.0**15] + [2.0**14] * 5
    for nonfinite in ("stop", "skip"):  # 2 ** 16 halved 17 times is below 1
        with pytest.raises(UserError, match=r"step 17 is not finite at any loss scale down to 0.5 .*compute bf16"):
            trainer(
                url,
                Overflow(range(40)),
                evaluate=False,
                precision__compute="fp16",
                run__length="40st",
                run__nonfinite=nonfinite,
            ).fit()


def steps_of(engine: PlainEngine, numbers: range) -> None:
    for number in numbers:
        batch = share_of(number, 0, 1)
        if number == 1:
            batch.fields["y"][0] = 3e38
            batch.fields["mask"][0] = 1
        engine.forward_backward(batch, COUNT)
        engine.step(0.01, 0.5)


def test_the_scale_and_its_tracker_come_back_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "INTERVAL", 3)
    straight, first, second, other = (engine_for(0, 1, FP16) for _ in range(4))
    steps_of(straight, range(7))
    steps_of(first, range(4))
    checkpoints = Checkpointer(tmp_path, 3, Environment())
    path = checkpoints.save(4, first, {})
    checkpoints.load(path, second)
    steps_of(second, range(4, 7))
    for (name, one), (_, two) in zip(straight.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    assert straight.state_dict()["loss_scale"] == second.state_dict()["loss_scale"]
    assert straight.loss_scale == 2.0**16  # halved once, doubled once: the tracker came back, too
    assert not capsys.readouterr().err
    checkpoints.load(path, engine_for(0, 1, {}))
    assert "has a loss scale, which is left aside" in capsys.readouterr().err
    checkpoints.load(checkpoints.save(5, engine_for(0, 1, {}), {}), other)
    assert "has no loss scale" in capsys.readouterr().err
