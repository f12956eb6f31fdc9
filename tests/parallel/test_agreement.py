"""Ranks that should hold the same: a rank that does not is found under every layout; tied weights stay tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.conftest import TINY, Cli
from tests.parallel.matrix import LAYOUTS, build, share_of
from tests.parallel.test_engine import Normed, Regression, engine_for
from tests.parallel.test_engine import share_of as rows_of


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def faults(rank: int, ranks: int, overrides: dict[str, Any], disturbed: str, culprit: int) -> tuple[str, str]:
    """After a step; and again when one bit of one parameter of one rank was changed by hand."""
    _, mesh, engine = build("vit", rank, ranks, overrides)
    engine.forward_backward(share_of("vit", 0, mesh.data_rank, mesh.data_ranks), torch.tensor(10.0))
    engine.step(0.003, 1.0)
    before = engine.fault()
    parameter = dict(engine.named_parameters()).get(disturbed)
    if rank == culprit:
        assert parameter is not None
        local(parameter.detach()).view(torch.int32).view(-1)[0] ^= 1
    return before, engine.fault()


SPLIT = "blocks.0.mlp.up.weight"
WHOLE = "blocks.0.mlp_norm.weight"
CASES = [
    ("ddp 3, ragged", WHOLE, 1, f"parameter {WHOLE} .*: rank 1 departs from ranks 0, 2$", False),
    ("tp 2", WHOLE, 1, f"parameter {WHOLE} .*: ranks 0, 1 differ$", False),
    ("hsdp 2x2", WHOLE, 3, f"parameter {WHOLE} .*: ranks 1, 3 differ$", False),
    ("fsdp 2 x tp 2", WHOLE, 2, f"parameter {WHOLE} .*: ranks 2, 3 differ$", True),
    ("replicas 2 x tp 2", WHOLE, 2, f"parameter {WHOLE} .*: rank 2 departs from ranks 0, 1, 3$", True),
    ("replicas 2 x tp 2", SPLIT, 3, f"parameter {SPLIT} .*: ranks 1, 3 differ$", True),
    ("pp 2 x replicas 2", WHOLE, 1, f"parameter {WHOLE} .*: ranks 0, 1 differ$", True),
    ("pp 2 x tp 2", WHOLE, 0, f"parameter {WHOLE} .*: ranks 0, 1 differ$", True),
]


@pytest.mark.parametrize(
    ("name", "disturbed", "culprit", "words"),
    [
        pytest.param(*case[:4], marks=[pytest.mark.slow] if case[4] else [], id=f"{case[0]}: {case[1]}")
        for case in CASES
    ],
)
def test_a_rank_with_one_other_bit_is_found(name: str, disturbed: str, culprit: int, words: str) -> None:
    layout = LAYOUTS[name]
    found = run_ranks(faults, layout.ranks, layout.ranks, layout.overrides, disturbed, culprit)
    assert [before for before, _ in found] == [""] * layout.ranks
    assert len({after for _, after in found}) == 1
    with pytest.raises(UserError, match=words):
        raise UserError(found[0][1])


def test_shards_that_nobody_else_has_are_not_compared() -> None:
    for before, after in run_ranks(faults, 2, 2, {"parallel.dp_shard": 2}, WHOLE, 1):
        assert before == after == ""


def buffers_and_rates(rank: int, ranks: int) -> tuple[str, str, str]:
    engine = engine_for(rank, ranks, {}, Normed)
    engine.forward_backward(rows_of(0, rank, ranks), torch.tensor(10.0))
    engine.step(0.01, 0.5)
    before = engine.fault()
    engine.optimizer.param_groups[0]["lr"] = 0.01 + 0.001 * rank
    rates = engine.fault()
    engine.optimizer.param_groups[0]["lr"] = 0.01
    dict(engine.model.named_buffers())["1.0.running_mean"].add_(rank)
    return before, rates, engine.fault()


def test_learning_rates_and_running_statistics_are_compared() -> None:
    for before, rates, buffers in run_ranks(buffers_and_rates, 2, 2):
        assert before == ""
        assert rates.startswith("the learning rate is not the same")
        assert buffers.startswith("buffer 1.0.running_mean is not the same")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 4)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(torch.tanh(self.first(x))))


class WithTies(Regression):
    units: tuple[str, ...] = ()
    tensor: dict[str, str] = {}  # noqa: RUF012

    def model(self) -> nn.Module:
        return Tied()

    def plan(self) -> Plan:
        return Plan(self.units, self.tensor)


class Parted(WithTies):
    units = ("first",)
    tensor = {"first": "column", "last": "row"}  # noqa: RUF012


def trained_tied(rank: int, ranks: int, overrides: dict[str, Any], parted: bool) -> bool | str:
    task = Parted if parted else WithTies
    config = load_overrides(Config(), overrides)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), torch.device("cpu"))
    try:
        engine = parallelize(task(config), config, mesh, torch.device("cpu"))
    except UserError as error:
        return str(error)
    engine.forward_backward(rows_of(0, rank, ranks), torch.tensor(10.0))
    engine.step(0.01, 0.5)
    return engine.model.first.weight is engine.model.again.weight  # type: ignore[union-attr]


def test_tied_weights_stay_one_or_the_layout_is_refused() -> None:
    assert run_ranks(trained_tied, 2, 2, {}, True) == [True, True]
    assert run_ranks(trained_tied, 2, 2, {"parallel.dp_shard": 2}, False) == [True, True]
    assert run_ranks(trained_tied, 2, 2, {"parallel.dp_shard": 2}, True) == [True, True]
    for message in run_ranks(trained_tied, 2, 2, {"parallel.tp": 2}, True):
        assert "first.weight and again.weight of Tied are one weight" in message


@pytest.mark.slow
def test_a_run_whose_ranks_drift_apart_ends_with_one_sentence(cli: Cli, tmp_path: Path) -> None:
    drift = """        if trainer.step == 5 and os.environ["RANK"] == "1":
            with torch.no_grad():
                next(trainer.engine.model.parameters()).view(-1)[0] += 1
"""
    head, marker, rest = Path(TINY).read_text().partition("    def step_end(self, trainer):\n")
    (tmp_path / "drifting.py").write_text(head + marker + drift + rest)
    done = cli("train", "drifting.py", "--preset", "small", "--nproc", "2", "--run.check_every", "3st")
    assert done.status == 2
    errors = [line for line in done.err.splitlines() if line.startswith("dltrain:")]
    assert len(errors) == 1
    assert "error: after step 6, parameter 1.weight is not the same" in errors[0]
    assert "ranks 0, 1 differ" in errors[0]
    assert "Traceback" not in done.err
