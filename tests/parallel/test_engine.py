"""Every data-parallel layout gives the numbers of one process; so do micro-batches, ragged shares and clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.hooks.base import Request
from dltrain.mesh import build_mesh
from dltrain.models.vision import small_cnn
from dltrain.models.vision.small_cnn import SmallCNN
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.plan import Plan
from dltrain.readings import Readings
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.testing.ranks import run_ranks

STEPS = 6
LAYOUTS = {
    "ddp x2": (2, {}),
    "ddp x3, ragged": (3, {}),
    "fsdp x2": (2, {"parallel.dp_shard": 2}),
    "fsdp x3, ragged": (3, {"parallel.dp_shard": -1}),
    "zero-2 x2": (2, {"parallel.dp_shard": 2, "parallel.reshard_after_forward": False}),
    "hsdp 2x2": (4, {"parallel.dp_shard": 2, "parallel.dp_replicate": 2}),
    "micro-batches": (1, {"parallel.micro_batch": 3}),
    "ddp x2, micro-batches": (2, {"parallel.micro_batch": 2}),
    "fsdp x2, micro-batches": (2, {"parallel.micro_batch": 2, "parallel.dp_shard": 2}),
}


class Regression(Task):
    """Targets may be masked: each sample counts as many as it has."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (F.mse_loss(outputs, batch.fields["y"], reduction="none") * batch.fields["mask"]).sum(1)

    def count(self, batch: Batch) -> Tensor:
        return batch.fields["mask"].sum(1)


def share_of(step: int, rank: int, ranks: int, samples: int = 10) -> Batch:
    """The rank's share of step ``step``, padded with weight 0 to the size of the largest share."""
    random = np.random.default_rng(step)
    x, y = random.normal(size=(samples, 6)), random.normal(size=(samples, 4))
    mask = random.random(size=(samples, 4)) < 0.7
    mine = list(range(rank, samples, ranks))
    size = -(-samples // ranks)
    padded = mine + mine[:1] * (size - len(mine))
    fields = {n: torch.tensor(v[padded], dtype=torch.float32) for n, v in (("x", x), ("y", y), ("mask", mask))}
    weight = torch.tensor([1.0] * len(mine) + [0.0] * (size - len(mine)))
    return Batch(fields, weight, tuple(map(str, padded)), torch.tensor(padded))


def engine_for(rank: int, ranks: int, overrides: dict[str, Any], task: type[Regression] = Regression) -> PlainEngine:
    config = load_overrides(Config(), {"optim.max_norm": 0.5, "optim.learning_rate": 0.01, **overrides})
    environment = Environment(rank, ranks, rank, ranks)
    mesh = build_mesh(config.parallel, environment, torch.device("cpu"))
    return parallelize(task(config), config, mesh, torch.device("cpu"))


def train(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses and gradient norms of each step, and the weights at the end."""
    engine = engine_for(rank, ranks, overrides)
    readings, losses, norms = Readings(engine.device), [], []
    for step in range(STEPS):
        batch = share_of(step, rank, ranks)
        count = readings.reduce(torch.dot(engine._task.count(batch), batch.weight), Request(0))
        loss = engine.forward_backward(batch, count)
        norm = engine.step(0.01, 0.5)
        readings.push(step, (0, 0), 0.01, loss.sum, norm)
        losses += [reading.loss for reading in readings.flush()]
        norms.append(norm.item())
    weights = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
               for name, value in engine.state_dict()["model"].items()}  # fmt: skip
    return losses, norms, {name: value.detach().clone() for name, value in weights.items()}


@pytest.fixture(scope="module")
def one_process() -> tuple[list[float], list[float], dict[str, Tensor]]:
    return run_ranks(train, 1, 1, {})[0]


ALSO_IN_THE_MATRIX = ("fsdp x2", "zero-2 x2", "hsdp 2x2", "fsdp x2, micro-batches")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in ALSO_IN_THE_MATRIX else ()) for name in LAYOUTS],
)
def test_a_layout_gives_the_numbers_of_one_process(layout: str, one_process: Any) -> None:
    ranks, overrides = LAYOUTS[layout]
    losses, norms, weights = one_process
    for found_losses, found_norms, found_weights in run_ranks(train, ranks, ranks, overrides):
        # fp32 noise of another order of summation: 40 times the 2.4e-7 measured for such layouts
        assert found_losses == pytest.approx(losses, abs=1e-5)
        assert found_norms == pytest.approx(norms, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, atol=1e-5, rtol=0)


def bare_loop() -> list[float]:
    """The same maths in plain PyTorch, from the definition: sum of masked losses over the count, clipped, AdamW."""
    torch.manual_seed(0)
    engine = engine_for(0, 1, {})  # for its initial weights alone
    model = engine.model
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )
    losses = []
    for step in range(STEPS):
        batch = share_of(step, 0, 1)
        squared = (model(batch.fields["x"]) - batch.fields["y"]) ** 2 * batch.fields["mask"]
        loss = squared.sum() / batch.fields["mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_one_process_gives_the_numbers_of_plain_pytorch(one_process: Any) -> None:
    assert one_process[0] == pytest.approx(bare_loop(), abs=1e-6)
    assert one_process[0][0] > one_process[0][-1] or max(one_process[1]) > 0.5  # it trained, and was clipped


class Normed(Regression):
    """With batch norm, whose statistics are fp32 under every precision."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 4))


class NormedAsAUnit(Regression):
    """The same, where structure makes the norm a unit of its own."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def normed_losses(rank: int, ranks: int, overrides: dict[str, Any], task: type[Regression] = Normed) -> list[float]:
    engine, readings, losses = engine_for(rank, ranks, overrides, task), Readings(torch.device("cpu")), []
    for step in range(STEPS):
        batch = share_of(step, rank, ranks)
        count = readings.reduce(torch.dot(engine._task.count(batch), batch.weight), Request(0))
        loss = engine.forward_backward(batch, count)
        readings.push(step, (0, 0), 0.01, loss.sum, engine.step(0.01, 0.5))
        losses += [reading.loss for reading in readings.flush()]
    engine.evaluate(share_of(0, rank, ranks))
    return losses


@pytest.mark.parametrize(
    "overrides", [{}, {"precision.compute": "bf16"}, {"optim.name": "sgd"}, {"precision.channels_last": True}]
)
def test_fsdp_gives_the_losses_of_ddp_with_batch_norm(overrides: dict[str, Any]) -> None:
    ddp = run_ranks(normed_losses, 2, 2, overrides)
    fsdp = run_ranks(normed_losses, 2, 2, {**overrides, "parallel.dp_shard": 2})
    assert fsdp[0] == pytest.approx(ddp[0], abs=2e-2 if overrides.get("precision.compute") else 1e-5)


def statistics_after_nan(rank: int, ranks: int, overrides: dict[str, Any]) -> bool:
    engine = engine_for(rank, ranks, {**overrides, "run.nonfinite": "skip"}, Normed)
    for step in range(3):
        batch = share_of(step, rank, ranks)
        if step == 1:
            batch.fields["x"][0, 0] = float("nan")
        engine.forward_backward(batch, torch.tensor(10.0))
        engine.step(0.01, 0.5)
    return all(bool(buffer.isfinite().all()) for buffer in engine.model.buffers())


@pytest.mark.parametrize("compute", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_norm_may_be_a_unit(compute: str) -> None:
    overrides = {"precision.compute": compute, "parallel.dp_shard": 2}
    assert run_ranks(normed_losses, 2, 2, overrides, NormedAsAUnit) == run_ranks(normed_losses, 2, 2, overrides)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_leaves_running_statistics_finite(ranks: int) -> None:
    assert run_ranks(statistics_after_nan, ranks, ranks, {}) == [True] * ranks


def initial_weights(rank: int, ranks: int, overrides: dict[str, Any]) -> dict[str, Tensor]:
    state = engine_for(rank, ranks, overrides).state_dict()["model"]
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for name, v in state.items()}


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    alone = run_ranks(initial_weights, 1, 1, {})[0]
    for ranks, overrides in ((2, {}), (3, {"parallel.dp_shard": 3})):
        for found in run_ranks(initial_weights, ranks, ranks, overrides):
            assert all(torch.equal(found[name], weight) for name, weight in alone.items())


def synchronisations(rank: int, ranks: int, overrides: dict[str, Any]) -> int:
    """All-reduces of gradients in a step of several micro-batches."""
    engine = engine_for(rank, ranks, overrides)
    engine.settle(lambda: share_of(0, rank, ranks))
    with torch.profiler.profile() as profile:
        engine.forward_backward(share_of(0, rank, ranks), torch.tensor(1.0))
    return sum(event.count for event in profile.key_averages() if event.key == "gloo:all_reduce")


def test_accumulation_reduces_gradients_once() -> None:
    whole = run_ranks(synchronisations, 2, 2, {})
    pieces = run_ranks(synchronisations, 2, 2, {"parallel.micro_batch": 1})
    assert whole == pieces == [1, 1]


def skipped_update(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[bool, float]:
    engine = engine_for(rank, ranks, overrides)
    batch = share_of(0, rank, ranks)
    engine.forward_backward(batch, torch.tensor(1.0))
    engine.step(0.01, 0.5)
    before = {name: value.clone() for name, value in engine.model.named_parameters()}
    if rank == ranks - 1:
        batch.fields["x"][0, 0] = float("nan")
    engine.forward_backward(batch, torch.tensor(1.0))
    norm = engine.step(0.01, 0.5)
    same = all(bool((value == before[name]).all()) for name, value in engine.model.named_parameters())
    return same, norm.item()


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, {}), (2, {}), (2, {"parallel.dp_shard": 2}), (1, {"optim.name": "sgd"})]
)
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(ranks: int, overrides: dict[str, Any]) -> None:
    for same, norm in run_ranks(skipped_update, ranks, ranks, overrides):
        assert same
        assert not np.isfinite(norm)


@pytest.mark.parametrize("overrides", [{}, {"parallel.dp_shard": 2}], ids=["ddp", "fsdp"])
def test_bf16_keeps_fp32_weights_and_stays_near_fp32(overrides: dict[str, Any], one_process: Any) -> None:
    for losses, _, weights in run_ranks(train, 2, 2, {"precision.compute": "bf16", **overrides}):
        assert losses == pytest.approx(one_process[0], abs=3e-2)
        assert losses != one_process[0]
        assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_compiled_training_agrees_with_eager(one_process: Any) -> None:
    losses, _, weights = run_ranks(train, 1, 1, {"precision.compile": True}, seconds=180)[0]
    assert losses == pytest.approx(one_process[0], abs=1e-5)
    assert weights.keys() == one_process[2].keys()  # compilation leaves no mark in the names


class Asleep(Regression):
    """Its model comes in evaluation mode, as those that were trained before may."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 4)).eval()


def trained_with_dropout(rank: int, ranks: int, overrides: dict[str, Any]) -> bool:
    engine = engine_for(rank, ranks, overrides, Asleep)
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses.append(engine.forward_backward(share_of(0, rank, ranks), torch.tensor(10.0)).sum.item())
        engine.optimizer.zero_grad()
    return losses[0] != losses[1]


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(2, {}), pytest.param(2, {"parallel.dp_shard": 2}, marks=pytest.mark.slow)]
)
def test_a_model_that_comes_in_evaluation_mode_is_trained(ranks: int, overrides: dict[str, Any]) -> None:
    assert all(run_ranks(trained_with_dropout, ranks, ranks, overrides))


class WithoutTuple(Regression):
    def inputs(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return batch.fields["x"]


class OfAnotherField(Regression):
    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch.fields["target"]).square().mean(1)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (WithoutTuple, r"WithoutTuple.inputs\(\) returned Tensor; return a tuple of the model's arguments"),
        (OfAnotherField, "the batch has no field 'target'; Task.sample returned 'x', 'y', 'mask'"),
    ],
)
def test_what_a_task_gets_wrong_about_its_batch_is_told(task: type[Regression], words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine_for(0, 1, {}, task).forward_backward(share_of(0, 0, 1), torch.tensor(10.0))


def test_a_plan_that_matches_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"pattern 'blocks\.\*' matches no module"):
        Plan(("blocks.*",)).modules(model)
    assert Plan.auto(model).units == ("0", "2")
    blocks = SmallCNN(channels=1, size=8, classes=10)
    assert [type(unit).__name__ for unit in small_cnn.PLAN.modules(blocks)] == ["Sequential"] * 3  # not their layers
    nested = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]), "b": nn.Linear(2, 2)})
    assert Plan.auto(nested).units == ("a.0",)


@pytest.mark.parametrize(
    ("replicate", "shard", "message"),
    [(2, 1, "= 2, but there are 4 ranks"), (3, -1, "dp_replicate is 3, which does not divide the 4 ranks")],
)
def test_degrees_that_do_not_make_the_world_are_refused(replicate: int, shard: int, message: str) -> None:
    config = load_overrides(Config(), {"parallel.dp_replicate": replicate, "parallel.dp_shard": shard})
    with pytest.raises(ValueError, match=message):
        build_mesh(config.parallel, Environment(0, 4, 0, 4), torch.device("cpu"))


def test_samples_count_by_their_weights_and_none_at_all_changes_nothing() -> None:
    """loss = sum(w l) / sum(w c), with weights that are no whole numbers; all 0 is no gradient."""
    engine = engine_for(0, 1, {})
    batch = replace(share_of(0, 0, 1), weight=torch.linspace(0.1, 2.5, 10))
    before = [value.detach().clone() for _, value in engine.named_parameters()]
    _, losses = engine.evaluate(batch)
    expected = (torch.dot(losses, batch.weight) / batch.weight.sum()).item()
    loss = engine.forward_backward(batch, batch.weight.sum())
    assert (loss.sum / loss.count).item() == pytest.approx(expected, rel=1e-6)
    engine.optimizer.zero_grad(set_to_none=True)
    nothing = replace(batch, weight=torch.zeros(10))
    engine.forward_backward(nothing, nothing.weight.sum())
    assert all(not value.grad.any() for _, value in engine.named_parameters() if value.grad is not None)
    assert all(torch.equal(old, value) for old, (_, value) in zip(before, engine.named_parameters(), strict=True))
