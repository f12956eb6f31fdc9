"""Before the first step: everything is compiled, ranks wait for the slowest, and no trace is left."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dltrain.config import Parallel
from dltrain.mesh import build_mesh
from dltrain.parallel.settling import patiently
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import RankError, run_ranks
from tests.parallel.matrix import CPU, LAYOUTS, SAMPLES, build, share_of, train, whole
from tests.parallel.test_engine import Normed, Regression, engine_for
from tests.parallel.test_engine import share_of as regression_share


def compiles_longer(rank: int, patient: bool) -> float:
    """Rank 1 comes a second and a half later than a wait of one second allows."""
    mesh = build_mesh(Parallel(dp_shard=2), Environment(rank, 2, rank, 2), CPU)
    with patiently(mesh.groups(), 1.0):
        pass
    total = torch.ones(())
    with patiently(mesh.groups() if patient else [], 1.0):
        time.sleep(2.5 * rank)
        dist.all_reduce(total, group=mesh.shard_axes().get_group())
    return total.item()


@pytest.mark.slow
def test_ranks_wait_for_one_that_compiles_longer_than_a_collective_may_take() -> None:
    assert run_ranks(compiles_longer, 2, True) == [2.0, 2.0]
    with pytest.raises(RankError, match=r"(?i)timed out|timeout"):
        run_ranks(compiles_longer, 2, False)


def traces(rank: int, ranks: int, overrides: dict[str, Any]) -> list[bool]:
    engine = engine_for(rank, ranks, overrides, Normed)
    before = whole(engine)
    random = torch.get_rng_state()
    engine.settle(lambda: regression_share(0, rank, ranks))
    same = [torch.equal(value, before[name]) for name, value in whole(engine).items()]
    return [*same, torch.equal(random, torch.get_rng_state()), not list(engine.gradients())]


COMPILED = [
    (1, {"precision.compile": True}),
    (2, {"precision.compile": True, "parallel.dp_shard": 2}),
    (2, {"precision.compile": True}),
]


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(2, {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED)]
)
def test_nothing_remains_of_the_passes_before_the_first_step(ranks: int, overrides: dict[str, Any]) -> None:
    for found in run_ranks(traces, ranks, ranks, overrides, seconds=300):
        assert all(found)


def settled(rank: int, ranks: int, overrides: dict[str, Any]) -> Any:
    torch._dynamo.utils.counters.clear()
    _, mesh, engine = build("vit", rank, ranks, overrides)
    engine.settle(lambda: share_of("vit", 0, mesh.data_rank, mesh.data_ranks))
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine.forward_backward(share_of("vit", 1, mesh.data_rank, mesh.data_ranks), torch.tensor(10.0))
    return frames, torch._dynamo.utils.counters["stats"]["unique_graphs"]


LAYOUTS_COMPILED = ("ddp 2", "fsdp 2", "tp 2", "pp 2, 1f1b", "pp 2 x fsdp 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS_COMPILED)
def test_compiled_layouts_give_the_numbers_of_one_process(name: str) -> None:
    layout, expected = LAYOUTS[name], run_ranks(train, 1, 1, "vit", {})[0]
    settings = {**layout.overrides, "precision.compile": True}
    for found in run_ranks(train, layout.ranks, layout.ranks, "vit", settings, seconds=400):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp 2", "pp 2, 1f1b"])
def test_the_first_step_compiles_nothing_more(name: str) -> None:
    layout = LAYOUTS[name]
    settings = {**layout.overrides, "precision.compile": True}
    for before, after in run_ranks(settled, layout.ranks, layout.ranks, settings, seconds=400):
        assert 0 < before == after


def settles_and_trains(rank: int, ranks: int, family: str, overrides: dict[str, Any]) -> tuple[list[float], Any]:
    """Norms of three steps, and the weights."""
    _, mesh, engine = build(family, rank, ranks, overrides)
    engine.settle(lambda: share_of(family, 0, mesh.data_rank, mesh.data_ranks))
    norms = []
    for step in range(3):
        engine.forward_backward(share_of(family, step, mesh.data_rank, mesh.data_ranks), torch.tensor(float(SAMPLES)))
        norms.append(engine.step(0.003, 1.0).item())
    return norms, whole(engine)


SET = {"parallel.micro_batch": 2, "parallel.find_unused_parameters": True}


@pytest.mark.parametrize("overrides", [{}, pytest.param(SET, marks=pytest.mark.slow)])
def test_ddp_does_not_wait_for_parameters_that_no_step_uses(overrides: dict[str, Any]) -> None:
    norms, weights = run_ranks(settles_and_trains, 1, 1, "wasteful", {})[0]
    for found_norms, found in run_ranks(settles_and_trains, 2, 2, "wasteful", overrides):
        assert found_norms == pytest.approx(norms, rel=1e-4)
        for key, weight in weights.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=0)
            assert not key.startswith("idle") or torch.equal(found[key], weight)


class Wavering(nn.Module):
    """Every other pass in training leaves out one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.passes = nn.Linear(6, 4), nn.Linear(6, 4), 0

    def forward(self, values: Tensor) -> Tensor:
        self.passes += 1
        returned: Tensor = self.always(values) + (self.sometimes(values) if self.passes < 5 else 0)
        return returned


class Wavers(Regression):
    def model(self) -> nn.Module:
        return Wavering()


def wavers(rank: int, ranks: int, overrides: dict[str, Any]) -> list[float]:
    engine = engine_for(rank, ranks, overrides, Wavers)
    engine.settle(lambda: regression_share(0, rank, ranks))
    norms = []
    for step in range(4):
        engine.forward_backward(regression_share(step, rank, ranks), torch.tensor(8.0))
        norms.append(engine.step(0.01, 0.0).item())
    return norms


def test_steps_that_differ_in_what_they_use_are_told_of_the_setting() -> None:
    with pytest.raises(RankError, match=r"used fewer parameters than the first one.* parallel\.find_unused_parameters"):
        run_ranks(wavers, 2, 2, {})
    first, second = run_ranks(wavers, 2, 2, {"parallel.find_unused_parameters": True})
    assert first == second
