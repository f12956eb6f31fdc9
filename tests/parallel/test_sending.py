"""What ranks send each other, and when: settings of DDP and FSDP2 that leave the numbers as they are, or near."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from dltrain.errors import UserError
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import LAYOUTS, build, share_of, train
from tests.parallel.test_engine import synchronisations

SHARDED = {"parallel.dp_shard": 2}


@pytest.mark.parametrize("name", [
    "fsdp 2", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "zero-2, 2", "hsdp 2x2", "fsdp 2 x tp 2", "pp 2 x fsdp 2", "pp 2 x fsdp 2, zb-v")),
])  # fmt: skip
def test_gathering_ahead_changes_no_number(name: str) -> None:
    layout = LAYOUTS[name]
    expected = run_ranks(train, layout.ranks, layout.ranks, "vit", layout.overrides)
    found = run_ranks(train, layout.ranks, layout.ranks, "vit", {**layout.overrides, "parallel.prefetch": 2})
    assert [each.losses for each in found] == [each.losses for each in expected]
    assert [each.norms for each in found] == [each.norms for each in expected]


def ahead(rank: int, ranks: int, depth: int) -> list[tuple[int, int]]:
    """Of the root and each block: how many units it gathers ahead, forward and backward."""
    model: Any = build("vit", rank, ranks, {**SHARDED, "parallel.prefetch": depth})[2]
    states: list[Any] = [
        fully_shard.state(module)  # type: ignore[attr-defined]
        for module in model.model.modules()
        if isinstance(module, FSDPModule)
    ]
    return [(len(state._states_to_forward_prefetch), len(state._states_to_backward_prefetch)) for state in states]


def test_so_many_units_are_gathered_ahead() -> None:
    # root, block, block: the root begins forward and ends backward
    assert run_ranks(ahead, 2, 2, 1)[0] == [(1, 0), (1, 0), (0, 1)]
    assert run_ranks(ahead, 2, 2, 2)[0] == [(2, 0), (1, 0), (0, 1)]


def test_a_small_bucket_is_reduced_before_the_others() -> None:
    assert run_ranks(synchronisations, 2, 2, {"parallel.bucket_mib": 0.0005})[0] > 1


def compressed(rank: int, ranks: int, overrides: dict[str, Any], steps: int = 2) -> list[Tensor]:
    """Gradients of so many steps after those that send everything."""
    engine = build("vit", rank, ranks, overrides)[2]
    engine.settle(lambda: share_of("vit", 0, rank, ranks))
    for step in range(steps):
        engine.forward_backward(share_of("vit", step, rank, ranks), torch.tensor(10.0))
    return [gradient.clone() for _, gradient in engine.gradients()]


def test_half_precision_is_what_was_sent() -> None:
    for gradient in run_ranks(compressed, 2, 2, {"parallel.compress": "fp16"})[0]:
        assert torch.equal(gradient, gradient.half().float())
    for gradient in run_ranks(compressed, 2, 2, {"precision.reduce": "bf16", **SHARDED}, 1)[0]:
        assert torch.equal(gradient, gradient.bfloat16().float())


def squares(rank: int, ranks: int, rank_of_products: int) -> list[int]:
    engine = build("vit", rank, ranks, {"parallel.compress": "powersgd", "parallel.powersgd_rank": rank_of_products})[2]
    engine.settle(lambda: share_of("vit", 0, rank, ranks))
    engine.forward_backward(share_of("vit", 0, rank, ranks), torch.tensor(10.0))
    return [int(torch.linalg.matrix_rank(g, rtol=1e-4)) for n, g in engine.gradients() if n.endswith("mlp.up.weight")]


def test_powersgd_sends_products_of_its_rank_from_the_first_step() -> None:
    assert run_ranks(squares, 2, 2, 1)[0] == [1, 1]
    assert run_ranks(squares, 2, 2, 3)[0] == [3, 3]


# over ten steps: 3e-4, 3e-2 and 7e-3 were measured
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"parallel.compress": "fp16"}, 1e-3),
        ({"precision.reduce": "bf16", "parallel.micro_batch": 2, **SHARDED}, 1e-2),
        pytest.param({"parallel.compress": "powersgd"}, 0.1, marks=pytest.mark.slow),
        pytest.param({"parallel.compress": "powersgd", "parallel.powersgd_rank": 4}, 2e-2, marks=pytest.mark.slow),
        pytest.param({"parallel.compress": "fp16", "parallel.micro_batch": 2}, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_losses_stay_near_those_of_whole_gradients(settings: dict[str, Any], tolerance: float) -> None:
    expected = run_ranks(train, 1, 1, "vit", {})[0]
    for found in run_ranks(train, 2, 2, "vit", settings):
        assert found.losses == pytest.approx(expected.losses, abs=tolerance)
        assert found.losses != expected.losses


def refusal(rank: int, ranks: int, settings: dict[str, Any]) -> str:
    try:
        build("vit", rank, ranks, settings)
    except UserError as error:
        return str(error)
    return ""


def test_gloo_adds_up_no_bf16() -> None:
    for found in run_ranks(refusal, 2, 2, {"parallel.compress": "bf16"}):
        assert "which torch promises for NCCL alone" in found
