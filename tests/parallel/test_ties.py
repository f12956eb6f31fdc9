"""One parameter under two names is trained as one, under every layout that can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.checkpoint.checkpointer import Checkpointer, step_folder
from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import splits_of
from dltrain.parallel.ties import refuse_split_ties, self_contained, ties
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU, whole

STEPS, HALF, SAMPLES = 6, 3, 8


class Language(nn.Module):
    """Next tokens; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))


class Tied(Task):
    def model(self) -> nn.Module:
        return Language()

    def plan(self) -> Plan:
        chain = ("embed", "blocks.*", "head")
        return Plan(units=("embed", "blocks.*", "head"), tensor={"blocks.0.0": "column", "head": "row"}, chain=chain)

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), batch.fields["y"], reduction="none").mean(1)


def share(step: int, rank: int, ranks: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (SAMPLES, 6), generator=generator)[rank::ranks]
    mine = torch.arange(rank, SAMPLES, ranks)
    fields = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
    return Batch(fields, torch.ones(len(mine)), tuple(map(str, mine.tolist())), mine)


def train(
    rank: int, ranks: int, overrides: dict[str, Any], load: str = "", save: str = "", stop: int = STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of every step, and weights at the end."""
    config = load_overrides(Config(), {"optim.learning_rate": 0.01, **overrides})
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(Tied(config), config, mesh, CPU, lambda: share(0, 0, 1))
    start = 0
    if load:
        checkpoints = Checkpointer(Path(load), 3, mesh.environment)
        start = checkpoints.load(step_folder(Path(load), HALF), engine)["step"]
    norms = []
    for step in range(start, stop):
        engine.forward_backward(share(step, mesh.data_rank, mesh.data_ranks), torch.tensor(float(SAMPLES)))
        norms.append(engine.step(0.01, 1.0).item())
    if save:
        Checkpointer(Path(save), 3, mesh.environment).save(stop, engine, {"step": stop})
    assert [names[0] for names in ties(engine.model)] == ["embed.weight"]
    return norms, whole(engine)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp 2": (2, {}),
    "fsdp 2": (2, {"parallel.dp_shard": 2}),
    "hsdp 2x2": (4, {"parallel.dp_shard": 2, "parallel.dp_replicate": 2}),
}


@pytest.mark.parametrize("name", ["ddp 2", "fsdp 2", pytest.param("hsdp 2x2", marks=pytest.mark.slow)])
def test_a_layout_gives_the_numbers_of_one_process(name: str) -> None:
    norms, weights = run_ranks(train, 1, 1, {})[0]
    ranks, overrides = LAYOUTS[name]
    for found, values in run_ranks(train, ranks, ranks, overrides):
        assert found == pytest.approx(norms, rel=1e-5)
        assert values.keys() == weights.keys() >= {"embed.weight", "head.weight"}
        assert torch.equal(values["embed.weight"], values["head.weight"])
        for key, value in values.items():
            torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("before", "after"), [("one", "fsdp 2"), pytest.param("fsdp 2", "ddp 2", marks=pytest.mark.slow)]
)
def test_a_checkpoint_goes_on_under_another_layout(before: str, after: str, tmp_path: Path) -> None:
    norms, _ = run_ranks(train, 1, 1, {})[0]
    run_ranks(train, LAYOUTS[before][0], *LAYOUTS[before], "", str(tmp_path), HALF)
    for found, values in run_ranks(train, LAYOUTS[after][0], *LAYOUTS[after], str(tmp_path)):
        assert found == pytest.approx(norms[HALF:], rel=1e-5)
        assert torch.equal(values["embed.weight"], values["head.weight"])


def test_units_that_share_with_others_belong_to_the_root() -> None:
    model = Language()
    units = Tied(Config()).plan().modules(model)
    assert len(units) == 4
    assert self_contained(model, units) == list(model.blocks)
    inside = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    inside[0][1].weight = inside[0][0].weight
    assert self_contained(inside, [inside[0]]) == [inside[0]]


def test_a_tied_layer_is_not_split_and_not_cut_off() -> None:
    model, plan = Language(), Tied(Config()).plan()
    with pytest.raises(UserError, match=r"head.weight and embed.weight of Language are one weight, .* parallel.tp 1"):
        refuse_split_ties(model, splits_of(model, Plan(tensor={"blocks.0.0": "column", "head": "column"}), 1))
    from dltrain.parallel.pipeline.cut import chain

    with pytest.raises(UserError, match="embed and head of Language share a weight, and stages of a pipeline"):
        chain(model, plan)
