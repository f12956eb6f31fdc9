"""Before the first step: everything is compiled, ranks wait for the slowest, and no trace is left."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dltrain.config import Parallel
from dltrain.mesh import build_mesh
from dltrain.parallel.settling import patiently
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import RankError, run_ranks
from tests.parallel.matrix import CPU, LAYOUTS, build, share_of, train, whole
from tests.parallel.test_engine import Normed, engine_for
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
