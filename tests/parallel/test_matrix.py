"""Every layout gives the numbers of one process, for every family of models."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.models.transformer import Block
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import splits_of
from dltrain.parallel.tokens import roles_of
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import FAMILIES, HALF, LAYOUTS, WIDE, Trained, fits, layout, replicated, train

QUICK = ("tp 2", "fsdp 2 x tp 2")
"""Layouts that the default suite tries for every family; the others of it, which are not slow, for the first alone."""


def marks(family: str, name: str) -> list[pytest.MarkDecorator]:
    quick = not LAYOUTS[name].slow and family not in WIDE and (family == "vit" or name in QUICK)
    return [*([] if quick else [pytest.mark.slow]), *needs(name)]


def needs(*names: str) -> list[pytest.MarkDecorator]:
    deepspeed = any(name.startswith("deepspeed") for name in names)
    return [pytest.mark.skipif(deepspeed and not find_spec("deepspeed"), reason="deepspeed is not installed")]


CASES = [
    pytest.param(family, name, marks=marks(family, name), id=f"{family}: {name}")
    for family in FAMILIES
    for name in LAYOUTS
    if fits(family, name)
]


@cache
def alone(family: str) -> Trained:
    trained: Trained = run_ranks(train, 1, 1, family, {}, seconds=250)[0]
    return trained


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_layout_gives_the_numbers_of_one_process(family: str, name: str) -> None:
    expected, layout = alone(family), LAYOUTS[name]
    assert max(expected.norms) > 1.0  # something was clipped
    found = run_ranks(train, layout.ranks, layout.ranks, family, layout.overrides, seconds=250)
    for each in found:
        # fp32 noise of another order of summation: 40 times the 2.4e-7 measured for such layouts
        assert each.losses == pytest.approx(expected.losses, abs=1e-5)
        assert each.norms == pytest.approx(expected.norms, rel=1e-4)
        if each.evaluated:
            assert each.evaluated == pytest.approx(expected.evaluated, abs=1e-4)
    assert any(each.evaluated for each in found)
    assert {name: weight.shape for each in found for name, weight in each.weights.items()} == {
        name: weight.shape for name, weight in expected.weights.items()
    }


PIPELINES = [name for name, layout in LAYOUTS.items() if layout.ranks == 2 and "parallel.pp" in layout.overrides]


@pytest.mark.parametrize("family", ["vit", pytest.param("patchtst", marks=pytest.mark.slow)])
def test_a_pipeline_gives_the_very_bits_of_one_process(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same micro-batches on as many threads: losses, norms and weights."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of each rank, and of one process alone
    pieces = {"parallel.micro_batch": 1}  # it divides the batch: a filled-up one sums in another order
    expected = run_ranks(train, 1, 1, family, pieces)[0]
    assert len(PIPELINES) == 7
    for name in PIPELINES if family == "patchtst" else ("pp 2, interleaved 1f1b", "pp 2, zb-v"):
        found = run_ranks(train, 2, 2, family, {**LAYOUTS[name].overrides, **pieces})
        weights = {name: weight for each in found for name, weight in each.weights.items()}
        assert [each.losses for each in found] == [expected.losses] * 2, name
        assert [each.norms for each in found] == [expected.norms] * 2, name
        assert weights.keys() == expected.weights.keys()
        assert all(torch.equal(weight, expected.weights[name]) for name, weight in weights.items())


@pytest.mark.slow
def test_a_stage_without_parameters_is_averaged_with_the_others() -> None:
    ema = {"optim.ema": 0.9, "run.nonfinite": "skip"}
    expected = run_ranks(train, 1, 1, "mixer", ema)[0]
    for found in run_ranks(train, 4, 4, "mixer", {**LAYOUTS["pp 4, 1f1b"].overrides, **ema}):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)


CHANGES = [
    ("vit", "one", "tp 2", False),
    ("vit", "tp 2", "fsdp 2", False),
    ("vit", "fsdp 2 x tp 2", "one", False),
    ("patchtst", "ddp 2", "fsdp 2 x tp 2", False),
    ("patchtst", "tp 2", "ddp 2", True),
    ("vit", "hsdp 2x2", "replicas 2 x tp 2", True),
    ("vit", "tp 4", "tp 2", True),
    ("patchtst", "fsdp 3, ragged", "tp 2", True),
    ("vit", "pp 2, 1f1b", "fsdp 2", False),
    ("vit", "tp 2", "pp 2, zb-v", True),
    ("patchtst", "ddp 2", "pp 2 x fsdp 2, zb-v", True),
    ("vit", "pp 2 x fsdp 2 x tp 2", "one", True),
    ("vit", "pp 2, zb-v", "pp 4, 1f1b", True),
    ("mixer", "pp 4, 1f1b", "ddp 2", True),  # a stage of four has no parameters
    ("mixer", "one", "pp 4, 1f1b", True),
    ("vit", "deepspeed zero-3", "fsdp 2", False),
    ("vit", "one", "deepspeed zero-2", True),
    ("vit", "fsdp 2", "deepspeed zero-3, ragged", True),
    ("patchtst", "deepspeed zero-2, offload", "ddp 2", True),
]


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        pytest.param(
            *case[:3],
            marks=[*([pytest.mark.slow] if case[3] else []), *needs(*case[1:3])],
            id=" > ".join(case[:3]),
        )
        for case in CHANGES
    ],
)
def test_a_checkpoint_of_any_layout_goes_on_under_any_other(
    family: str, before: str, after: str, tmp_path: Path
) -> None:
    layouts, folder, expected = {"one": layout(1), **LAYOUTS}, str(tmp_path), alone(family)
    first, second = layouts[before], layouts[after]
    run_ranks(train, first.ranks, first.ranks, family, first.overrides, "", folder, HALF)
    for found in run_ranks(train, second.ranks, second.ranks, family, second.overrides, folder):
        assert found.losses == pytest.approx(expected.losses[HALF:], abs=1e-5)
        assert found.norms == pytest.approx(expected.norms[HALF:], rel=1e-4)


@pytest.mark.parametrize(
    "overrides", [{"parallel.tp": 2}, {"parallel.tp": 2, "precision.compute": "bf16"}], ids=["fp32", "bf16"]
)
def test_ranks_that_share_layers_drop_the_same_and_stay_equal(overrides: dict[str, Any]) -> None:
    (_, first), (_, second) = run_ranks(replicated, 2, 2, overrides)
    assert {"embed.positions", "head.norm.weight", "blocks.0.attention_norm.weight"} <= first.keys()
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_bf16_stays_near_fp32_under_split_layers() -> None:
    for found in run_ranks(train, 2, 2, "vit", {"parallel.tp": 2, "precision.compute": "bf16"}):
        assert found.losses == pytest.approx(alone("vit").losses, abs=3e-2)
        assert found.losses != alone("vit").losses


class Odd(nn.Module):
    """Three heads, and a layer whose inputs cannot be halved."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(12, 3, 30)])
        self.head = nn.Linear(5, 4)
        self.conv = nn.Conv1d(2, 2, 1)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ({}, "the plan of Odd does not say how to split its layers"),
        ({"blocks.*.attention.query": "column"}, "blocks.0.attention has 3 heads, .* give parallel.tp one of 1, 3"),
        ({"head": "row"}, "head has 5 inputs, .* give parallel.tp one of 1, 5"),
        ({"head": "columns"}, "splits 'head' by 'columns'; did you mean 'column'"),
        ({"blocks.*.missing": "row"}, "'blocks.*.missing' matches no module of Odd"),
        ({"conv": "row"}, "splits conv, a Conv1d"),
    ],
)
def test_a_model_that_cannot_be_split_is_told_why(tensor: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        splits_of(Odd(), Plan(tensor=tensor), 2)


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("tokens", "setting", "words"),
    [
        ({"up": "deal"}, "parallel.sequence is on", "of Two names no module that joins them; give one the role 'join'"),
        ({"down": "join"}, "parallel.cp is 2", "of Two names no module that deals them out"),
        (
            {"up": "deal", "down": "join"},
            "parallel.cp is 2",
            "looks at all of them; give one the role 'attend'",
        ),
    ],
)
def test_tokens_that_would_be_left_apart_are_refused(tokens: dict[str, str], setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        roles_of(Two(), Plan(tokens=tokens), setting)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tp": 3}, "parallel.tp is 3, which does not divide the 4 ranks of a node"),
        ({"tp": 2, "dp_shard": 4}, "parallel.dp_shard is 4, which does not divide the 2 ranks"),
        ({"tp": 2, "dp_shard": 1, "dp_replicate": 1}, "1 x parallel.dp_shard 1 x parallel.tp 2 = 2, but there are 4"),
    ],
)
def test_degrees_that_do_not_fit_are_told(settings: dict[str, Any], words: str) -> None:
    config = load_overrides(Config(), {f"parallel.{name}": value for name, value in settings.items()})
    with pytest.raises(UserError, match=words):
        build_mesh(config.parallel, Environment(0, 4, 0, 4), torch.device("cpu"))
