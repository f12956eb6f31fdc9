"""Statistics are those of whole tensors, under every layout."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dltrain.debugger.histograms import EDGES
from dltrain.debugger.reductions import REDUCTIONS, reduce
from dltrain.debugger.sampler import Sampler, names_of
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import LAYOUTS, SAMPLES, build, share_of

KINDS = ("weights", "gradients", "updates", "momentum_buffer")
SETTINGS = {"optim.frozen": ["embed.patches.bias"], "optim.name": "sgd", "optim.momentum": 0.9}
"""Of weights that Adam would move by rounding alone, such as the bias of keys, no two layouts have the same."""

ROUNDING = 3e-7
"""Gradients of biases of keys are 0 but for what rounding leaves."""


def sampled(rank: int, ranks: int, overrides: dict[str, Any], kinds: tuple[str, ...] = KINDS) -> tuple[Any, Any, Any]:
    """Names, moments at the second step, and (of one process) the tensors themselves."""
    _, mesh, engine = build("vit", rank, ranks, {**SETTINGS, **overrides})
    names = names_of(engine, kinds)
    sampler = Sampler(engine, names, [name for name in names if "/" not in name or name.startswith("gradient/")])
    for step in range(2):
        engine.forward_backward(share_of("vit", step, mesh.data_rank, mesh.data_ranks), torch.tensor(float(SAMPLES)))
        if step:
            sampler.take("gradients")
            sampler.remember()
            before = {piece.name: piece.local.clone() for piece in engine.pieces("weights")}
            wholes = {f"gradient/{piece.name}": piece.local.clone() for piece in engine.pieces("gradients")}
        engine.step(0.003, 1.0)
    for kind in kinds:
        if kind != "gradients":
            sampler.take(kind)
    wholes |= {piece.name: piece.local for piece in engine.pieces("weights")}
    wholes |= {f"update/{name}": wholes[name] - value for name, value in before.items()}
    wholes |= {f"momentum_buffer/{piece.name}": piece.local for piece in engine.pieces("momentum_buffer")}
    table = sampler.send()
    return (
        sampler.names,
        (table.rows(), dict(zip(sampler.counted, table.counts(), strict=True))),
        (wholes if ranks == 1 else {}),
    )


@cache
def alone() -> tuple[list[str], tuple[np.ndarray[Any, Any], dict[str, Any]], dict[str, Tensor]]:
    return run_ranks(sampled, 1, 1, {})[0]


def test_statistics_are_those_of_the_tensors() -> None:
    names, (rows, _), wholes = alone()
    assert "gradient/embed.patches.bias" not in names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"gradient", "update", "momentum_buffer"}
    for name, row in zip(names, rows, strict=True):
        whole = wholes[name].double()
        assert reduce("mean", row) == pytest.approx(float(whole.mean()), rel=1e-6, abs=1e-8)
        assert reduce("std", row) == pytest.approx(float(whole.std(correction=0)), rel=1e-5, abs=1e-12)
        assert reduce("l2", row) == pytest.approx(float(whole.norm()), rel=1e-6)
        assert reduce("max", row) == float(whole.max())
        assert reduce("abs_min", row) == float(whole.abs().min())
        assert row[0] == whole.numel()


CASES = [
    ("ddp 2", False),
    ("ddp 3, ragged", True),
    ("fsdp 2", True),
    ("fsdp 3, ragged", False),  # 5 classes and 2 registers on 3 ranks: some have no row of them
    ("hsdp 2x2", True),
    ("tp 2, sequence", False),
    ("fsdp 2 x tp 2", True),
    ("pp 2, 1f1b", False),
    ("pp 2 x fsdp 2, zb-v", True),
    ("pp 2 x fsdp 2 x tp 2", True),
    ("cp 2", True),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if slow else []) for name, slow in CASES])
def test_statistics_are_the_same_under_every_layout(name: str) -> None:
    names, (rows, counts), wholes = alone()
    layout = LAYOUTS[name]
    expected = dict(zip(names, rows, strict=True))
    everyone = run_ranks(sampled, layout.ranks, layout.ranks, layout.overrides)
    for found_names, (found_rows, found_counts), _ in everyone:
        assert sorted(found_names) == sorted(names)
        for key, some in found_counts.items():  # a value that rounding moves over an edge is counted in the next bin
            assert some.sum() == counts[key].sum()
            below = np.abs(np.cumsum(some - counts[key]))[np.abs(EDGES[1:]) > 10 * ROUNDING]
            assert below.max() <= max(2, 0.002 * some.sum()), key
        for key, row in zip(found_names, found_rows, strict=True):
            largest = float(wholes[key].abs().max())
            assert row[0] == expected[key][0], key  # every element once
            for reduction in REDUCTIONS:
                bound = 1e-5 * largest * (row[0] if reduction in ("sum", "l1", "abs_sum") else 1) + ROUNDING
                if "fraction" not in reduction:
                    assert abs(reduce(reduction, row) - reduce(reduction, expected[key])) <= bound, (key, reduction)
    assert all(np.array_equal(found[1][0], everyone[0][1][0]) for found in everyone)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 3])
def test_statistics_are_the_same_under_deepspeed(stage: int) -> None:
    names, (rows, _), _ = alone()
    expected = dict(zip(names, rows, strict=True))
    layout = LAYOUTS[f"deepspeed zero-{stage}"]
    kinds = ("weights", "gradients", "momentum_buffer")
    for found_names, (found_rows, _), _ in run_ranks(sampled, 2, 2, layout.overrides, kinds):
        for key, row in zip(found_names, found_rows, strict=True):
            assert row[0] == expected[key][0]
            assert reduce("l2", row) == pytest.approx(float(reduce("l2", expected[key])), rel=1e-4, abs=1e-8)
