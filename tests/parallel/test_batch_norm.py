"""Synchronised batch norm: statistics and gradients of all data ranks, so that layouts agree in training, too."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.batch_norm import SynchronisedBatchNorm, synchronise
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU, whole

SAMPLES = 12  # equal shares for two and for three ranks


def norm_of(shape: tuple[int, ...], **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    norm = (nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d)(shape[1], **settings)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def normed(rank: int, ranks: int, shape: tuple[int, ...], settings: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's outputs and gradients, and what the norm has become after two batches."""
    norm, found = norm_of(shape, **settings), {}
    synchronise(norm, dist.group.WORLD if ranks > 1 else None)
    for step in range(2):
        torch.manual_seed(step)
        values, direction = torch.randn(shape) * 3 + 1000, torch.randn(shape)
        mine = values[rank::ranks].clone().requires_grad_()
        outputs = norm(mine)
        outputs.backward(direction[rank::ranks])
        found |= {f"out {step}": outputs.detach(), f"grad {step}": mine.grad}
    found |= {f"grad {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {**found, **norm.state_dict()}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((12, 3), {}), ((12, 3, 2, 2), {"momentum": None}), ((12, 3, 5), {"affine": False, "track_running_stats": False})],
)
def test_it_is_the_batch_norm_of_all_samples_forward_and_backward(
    shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    whole_batch = normed(0, 1, shape, settings)
    parts = run_ranks(normed, 3, 3, shape, settings)
    for name, expected in whole_batch.items():
        found = [part[name] for part in parts]
        if name in ("grad weight", "grad bias"):  # which DDP and FSDP2 add up
            torch.testing.assert_close(sum(found), expected, atol=1e-3, rtol=1e-3)
        elif name.startswith(("out", "grad")):
            for rank, part in enumerate(found):
                # values around 1000 with a deviation of 3: fp32 has 1e-4 of them
                torch.testing.assert_close(part, expected[rank::3], atol=1e-3, rtol=1e-3)
        else:
            assert all(torch.equal(part, found[0]) for part in found)
            torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


class Normed(Task):
    """Two convolutions and a linear layer, each with batch norm; of a chain.

    None has a bias: a norm takes it off again, so that its gradient is rounding errors, which Adam makes steps of.
    """

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(24, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh()),
            nn.Linear(8, 4),
        )

    def plan(self) -> Plan:
        return Plan(units=("0", "1", "2"), chain=("0", "1", "2", "3"))

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["y"], reduction="none")


def train(rank: int, ranks: int, overrides: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Loss sums over all ranks that have any, of six steps, and weights and statistics at the end."""
    settings = {"optim.learning_rate": 0.01, "precision.batch_norm": "synchronised", **overrides}
    config = load_overrides(Config(), settings)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(Normed(config), config, mesh, CPU, lambda: share(0, 0, 1))
    losses = []
    for step in range(6):
        total = engine.forward_backward(share(step, mesh.data_rank, mesh.data_ranks), torch.tensor(float(SAMPLES))).sum
        total = total * engine.counts
        if ranks > 1:
            dist.all_reduce(total)
        engine.step(0.01, 1.0)
        losses.append(total.item() / SAMPLES)
    return losses, whole(engine)


def share(step: int, rank: int, ranks: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(SAMPLES, 2, 6, 6, generator=generator), torch.randint(4, (SAMPLES,), generator=generator)
    mine = torch.arange(rank, SAMPLES, ranks)
    return Batch({"x": x[mine], "y": y[mine]}, torch.ones(len(mine)), tuple(map(str, mine.tolist())), mine)


def settings(**values: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in values.items()}


LAYOUTS = {
    "ddp 2": (2, settings(), {}),
    "ddp 3": (3, settings(), {}),
    "fsdp 2": (2, settings(dp_shard=2), {}),
    "hsdp 2x2, micro-batches": (4, settings(dp_shard=2, dp_replicate=2, micro_batch=1), settings(micro_batch=4)),
    "pp 2": (2, settings(pp=2, micro_batch=6), settings(micro_batch=6)),
    "pp 2 x replicas 2": (4, settings(pp=2, micro_batch=3), settings(micro_batch=6)),
    "pp 2 x fsdp 2, zb-v": (
        4,
        settings(pp=2, dp_shard=2, micro_batch=3, schedule="zbv_zero_bubble"),
        settings(micro_batch=6),
    ),
    "compiled": (2, {"precision.compile": True}, {}),
}
QUICK = ("ddp 3", "fsdp 2", "pp 2 x fsdp 2, zb-v")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_layouts_give_the_losses_and_running_statistics_of_one_process(name: str) -> None:
    ranks, overrides, alone = LAYOUTS[name]
    losses, weights = run_ranks(train, 1, 1, alone)[0]
    for found, values in run_ranks(train, ranks, ranks, overrides, seconds=180):
        assert found == pytest.approx(losses, abs=1e-5)
        for key, value in values.items():
            if "running" in key:
                torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=1e-5)
    assert any("running_var" in key for key in values)


def test_local_statistics_are_another_training() -> None:
    losses, _ = run_ranks(train, 1, 1, {})[0]
    assert run_ranks(train, 2, 2, {"precision.batch_norm": "local"})[0][0] != pytest.approx(losses, abs=1e-3)


class Peculiar(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return input


def one_of_each(rank: int) -> bool:
    with pytest.raises(UserError, match="0 is a Peculiar with a forward of its own"):
        synchronise(nn.Sequential(Peculiar(2)), dist.group.WORLD)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    names, norm = list(model.state_dict()), model[1]
    synchronise(model, dist.group.WORLD)
    copied = deepcopy(model).eval()
    return list(model.state_dict()) == names and model[1] is norm and isinstance(copied[1], SynchronisedBatchNorm)


def test_modules_stay_the_same_objects_and_those_with_another_forward_are_refused() -> None:
    assert run_ranks(one_of_each, 2) == [True, True]
