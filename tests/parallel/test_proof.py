"""Layers and tokens that are shared out compute what the whole model does, or training does not begin."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU

WIDTH, HEADS, TOKENS = 8, 4, 6
TENSOR = {"up": "column", "down": "row"}


class Mixing(nn.Module):
    """Attention of queries, keys and values, all one; with a mask that lets none look ahead, if it is to."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self._causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self._causal)


class Model(nn.Module):
    """Tokens through a column, something, and a row, with a weight of its own and another layer at the end."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Identity(), nn.Linear(WIDTH, 1)
        self.up = nn.Linear(WIDTH, 3 * WIDTH if how == "fused" else 2 * WIDTH)
        self.down = nn.Linear(WIDTH if how in ("glu", "fused") else 2 * WIDTH, WIDTH)
        self.norm, self.gamma = nn.LayerNorm(2 * WIDTH // HEADS), nn.Parameter(torch.ones(WIDTH))
        self.inplace, self.mix = nn.ReLU(inplace=True), Mixing(how == "causal")
        if how == "unlike copies":
            self.leaf = torch.ones(1, requires_grad=True) * 2  # which cannot be copied

    def forward(self, values: Tensor) -> Tensor:
        tokens = self.first(values)
        if self.how in ("tokens", "causal"):
            heads = tokens.unflatten(2, (HEADS, -1)).transpose(1, 2)
            tokens = self.mix(heads, heads, heads).transpose(1, 2).flatten(2)
        if self.how == "looks" and values.sum() > 1e9:
            tokens = -tokens
        hidden = self._between(self.up(tokens))
        tokens = tokens + self.gamma * self.down(hidden)
        returned: Tensor = self.last(tokens).mean(1)
        return returned

    def _between(self, hidden: Tensor) -> Tensor:
        if self.how == "heads":  # as many on each rank as there are in all
            return hidden.unflatten(2, (HEADS, -1)).softmax(-1).flatten(2)
        if self.how == "fused":
            query, key, value = hidden.chunk(3, -1)
            return query * key.sigmoid() + value
        if self.how == "glu":
            return F.glu(hidden)
        if self.how == "norm":
            return self.norm(hidden.unflatten(2, (-1, 2 * WIDTH // HEADS))).flatten(2)
        return self.inplace(hidden) if self.how == "inplace" else hidden.relu()


class Shared(Task):
    how, parts = "", Plan()

    def model(self) -> nn.Module:
        return Model(self.how)

    def plan(self) -> Plan:
        return self.parts

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["x"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs[:, 0] - batch.fields["y"]).square()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    fields = {"x": torch.randn(4, TOKENS, WIDTH, generator=generator), "y": torch.randn(4, generator=generator)}
    return Batch(fields, torch.ones(4), tuple("abcd"), torch.arange(4))


Case = tuple[str, Plan, dict[str, Any], str]
TP, SEQUENCE, CP = {"parallel.tp": 2}, {"parallel.tp": 2, "parallel.sequence": True}, {"parallel.cp": 2}
SHARED = {"first": "deal", "last": "join"}
CASES: dict[str, Case] = {
    "right": ("", Plan(tensor=TENSOR), TP, ""),
    "a value is looked at": ("looks", Plan(tensor=TENSOR), TP, ""),
    "no row": ("looks", Plan(tensor={"up": "column"}), TP,
               "parallel.tp is 2, and Model shared out as its plan says fails in down"),
    "no column": ("", Plan(tensor={"down": "row"}), TP, "fails in down ("),
    "heads are counted": ("heads", Plan(tensor=TENSOR), TP, "gives losses that differ from the whole model's by"),
    "a fused layer": ("fused", Plan(tensor=TENSOR), TP, "such as some of the heads, and without param"),
    "a gate": ("glu", Plan(tensor=TENSOR), TP, "gives losses that differ"),
    "a norm between": ("norm", Plan(tensor=TENSOR), TP, "gives norm.weight a gradient that differs from the whole"),
    "in place": ("inplace", Plan(tensor=TENSOR), TP, "fails in inplace (Output 0 of _ToTorchTensor is a view and is"),
    "a weight beside tokens": (
        "", Plan(tensor=TENSOR, tokens={**SHARED, "up": "gather"}), SEQUENCE, "gives gamma a gradient that differs"),
    "no gather": ("", Plan(tensor=TENSOR, tokens=SHARED), SEQUENCE, "up of Model, a column, is in no module with the"),
    "tokens": ("tokens", Plan(tokens={**SHARED, "mix": "attend"}), CP, ""),
    "a causal mask": ("causal", Plan(tokens={**SHARED, "mix": "attend"}), CP, "parallel.cp is 2, and Model shared out"),
}  # fmt: skip


def told(rank: int, ranks: int, cases: dict[str, Case]) -> dict[str, str]:
    """What is refused of each case, as a sentence; nothing where it is not."""
    found = {}
    for name, (how, plan, overrides, _) in cases.items():
        config = load_overrides(Config(), overrides)
        mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
        task = type("Shared", (Shared,), {"how": how, "parts": plan})(config)
        said = StringIO()
        try:
            with redirect_stderr(said):
                parallelize(task, config, mesh, CPU, batch)
            found[name] = said.getvalue()
        except UserError as error:
            found[name] = str(error)
    return found


def test_what_shares_compute_otherwise_is_refused_on_every_rank() -> None:
    everyone = run_ranks(told, 2, 2, CASES)
    assert everyone[0] == everyone[1]
    for name, (*_, words) in CASES.items():
        assert (words in everyone[0][name]) if words else not everyone[0][name], (name, everyone[0][name])


def test_what_cannot_be_copied_is_said_and_it_may_be_switched_off() -> None:
    plan = Plan(tensor=TENSOR)
    cases: dict[str, Case] = {
        "unlike copies": ("unlike copies", plan, TP, ""),
        "off": ("glu", Plan(tensor={"up": "column", "down": "row"}), {**TP, "parallel.prove": False}, ""),
    }
    found = run_ranks(told, 2, 2, cases)[0]
    assert "parallel.tp is 2, unproved, for a copy fails: Only Tensors created explicitly" in found["unlike copies"]
    assert not found["off"]


def random_state(rank: int, ranks: int) -> bool:
    """Weights, buffers, random numbers and modes are those of a run without."""
    states = []
    for prove in (True, False):
        config = load_overrides(Config(), {**TP, "parallel.prove": prove})
        mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
        task = type("Shared", (Shared,), {"parts": Plan(tensor=TENSOR)})(config)
        engine = parallelize(task, config, mesh, CPU, batch)
        states.append([*(p.local for p in engine.pieces("weights")), torch.get_rng_state()])
        assert all(parameter.grad is None for _, parameter in engine.named_parameters())
    return all(torch.equal(one, two) for one, two in zip(*states, strict=True))


def test_a_proof_leaves_no_trace() -> None:
    assert all(run_ranks(random_state, 2, 2))


@pytest.mark.parametrize("how", ["tokens", ""])
def test_the_model_of_these_tests_is_a_model(how: str) -> None:
    assert Model(how)(batch().fields["x"]).shape == (4, 1)
