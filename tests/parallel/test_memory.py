"""Where gradients and the optimizer live, in which numbers gradients are added up, and by which kernels used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.optim.optimizer import skips_by_itself
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import HALF, LAYOUTS, train
from tests.parallel.test_engine import Regression, engine_for

OFFLOAD = {"parallel.offload": True}


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [
    "fsdp 2", *slow("hsdp 2x2", "zero-2, 2", "fsdp 2 x tp 2", "pp 2 x fsdp 2", "pp 2 x fsdp 2, zb-v")
])  # fmt: skip
def test_offloaded_training_gives_the_same_numbers(name: str) -> None:
    """On CPUs, where nothing moves."""
    layout = LAYOUTS[name]
    expected = run_ranks(train, layout.ranks, layout.ranks, "vit", layout.overrides)
    found = run_ranks(train, layout.ranks, layout.ranks, "vit", {**layout.overrides, **OFFLOAD})
    assert [each.losses for each in found] == [each.losses for each in expected]
    assert [each.norms for each in found] == [each.norms for each in expected]


@pytest.mark.slow
def test_an_offloaded_run_goes_on_from_a_checkpoint_of_one_that_was_not(tmp_path: Path) -> None:
    sharded, expected = LAYOUTS["fsdp 2"].overrides, run_ranks(train, 1, 1, "vit", {})[0]
    run_ranks(train, 2, 2, "vit", sharded, "", str(tmp_path), HALF)
    for found in run_ranks(train, 2, 2, "vit", {**sharded, **OFFLOAD, "parallel.meta": True}, str(tmp_path)):
        assert found.losses == pytest.approx(expected.losses[HALF:], abs=1e-5)


class Small(Regression):
    """One weight, whose gradient is the sum of the samples."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs[:, 0]


def summed(rank: int, ranks: int, overrides: dict[str, Any]) -> float:
    """The gradient of 1 and of eight times 1/512, one after another."""
    engine = engine_for(rank, ranks, {"precision.compute": "bf16", "parallel.micro_batch": 1, **overrides}, Small)
    x = torch.full((9, 1), 1 / 512)
    x[0] = 1.0
    engine.forward_backward(Batch({"x": x}, torch.ones(9), tuple("abcdefghi"), torch.arange(9)), torch.tensor(2.0))
    return next(gradient.item() for _, gradient in engine.gradients())


@pytest.mark.parametrize("overrides", [{}, {"parallel.dp_shard": 2}], ids=["ddp", "fsdp"])
def test_gradients_of_micro_batches_are_added_up_in_fp32(overrides: dict[str, Any]) -> None:
    """bf16 has 8 bits: there 1 + 1/512 is 1, however often."""
    assert run_ranks(summed, 2, 2, overrides) == [1 + 8 / 512] * 2


def kernels(rank: int, ranks: int, overrides: dict[str, Any]) -> str:
    try:
        optimizer: Any = engine_for(rank, ranks, overrides).optimizer
    except UserError as error:
        return str(error)
    assert skips_by_itself(optimizer) == bool(optimizer.defaults["fused"])
    return "fused" if optimizer.defaults["fused"] else "foreach"


def test_the_optimizer_is_fused_or_goes_by_operations_as_asked() -> None:
    def asked(name: str, kind: str) -> dict[str, str]:
        return {"optim.name": name, "optim.implementation": kind}

    assert [kernels(0, 1, asked("adamw", kind)) for kind in ("auto", "fused", "foreach")] == [
        "fused", "fused", "foreach"
    ]  # fmt: skip
    assert [kernels(0, 1, asked("sgd", kind)) for kind in ("auto", "fused", "foreach")] == ["fused", "fused", "foreach"]
    sharded = {"parallel.dp_shard": 2}
    assert run_ranks(kernels, 2, 2, {**asked("sgd", "auto"), **sharded})[0] == "foreach"
    assert "torch has no fused SGD" in run_ranks(kernels, 2, 2, {**asked("sgd", "fused"), **sharded})[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp 2", "ddp 2", "tp 2", "pp 2 x fsdp 2", "pp 2, zb-v", "hsdp 2x2"])
def test_foreach_gives_the_numbers_of_fused(name: str) -> None:
    layout, expected = LAYOUTS[name], run_ranks(train, 1, 1, "vit", {})[0]
    for found in run_ranks(
        train, layout.ranks, layout.ranks, "vit", {**layout.overrides, "optim.implementation": "foreach"}
    ):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
