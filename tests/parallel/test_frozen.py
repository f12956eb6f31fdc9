"""Frozen parameters stay as they are, and the rest learns as on one process, under every layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.optim.freezing import freeze
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import HALF, LAYOUTS, Images, Trained, layout, train

# a whole first stage, a unit frozen in part, and a part of a split layer
PATTERNS = {
    "stage": ("embed.*", "blocks.0.*"),
    "mixed": ("blocks.0.attention.*", "blocks.1.mlp.up.weight", "head.out.bias"),
    "last": ("blocks.1.*", "head.*"),
}
CASES = [
    ("ddp 2", "mixed", False),
    ("fsdp 2", "mixed", False),
    ("fsdp 2", "stage", True),
    ("tp 2", "mixed", False),
    ("fsdp 2 x tp 2", "mixed", True),
    ("pp 2, 1f1b", "stage", False),
    ("pp 2, 1f1b", "last", True),
    ("pp 2, zb-v", "stage", True),
    ("pp 2, zb-v", "mixed", False),
    ("pp 2, zb-v", "last", True),
    ("pp 2 x fsdp 2, zb-v", "stage", False),
    ("pp 2 x fsdp 2", "last", True),
    ("pp 2 x tp 2", "stage", True),
    ("hsdp 2x2", "mixed", True),
]


def settings(which: str, **more: Any) -> dict[str, Any]:
    return {"optim.frozen": PATTERNS[which], **more}


@cache
def alone(which: str) -> Trained:
    return run_ranks(train, 1, 1, "vit", settings(which))[0]


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*case[:2], marks=[pytest.mark.slow] if case[2] else [], id=" ".join(case[:2])) for case in CASES],
)
def test_a_layout_gives_the_numbers_of_one_process(name: str, which: str) -> None:
    expected, layout = alone(which), LAYOUTS[name]
    torch.manual_seed(0)
    initial = Images(Config()).model()
    freeze(initial, PATTERNS[which])
    for found in run_ranks(train, layout.ranks, layout.ranks, "vit", {**layout.overrides, **settings(which)}):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)
        for key, parameter in initial.named_parameters():
            if key in found.weights:
                assert torch.equal(found.weights[key], parameter) != parameter.requires_grad, key


@pytest.mark.parametrize(
    ("before", "after"),
    [("pp 2, 1f1b", "fsdp 2"), pytest.param("fsdp 2", "pp 2 x fsdp 2, zb-v", marks=pytest.mark.slow)],
)
def test_a_checkpoint_goes_on_under_another_layout(before: str, after: str, tmp_path: Path) -> None:
    first, second, expected = LAYOUTS[before], LAYOUTS[after], alone("stage")
    frozen = settings("stage")
    run_ranks(train, first.ranks, first.ranks, "vit", {**first.overrides, **frozen}, "", str(tmp_path), HALF)
    for found in run_ranks(train, second.ranks, second.ranks, "vit", {**second.overrides, **frozen}, str(tmp_path)):
        assert found.losses == pytest.approx(expected.losses[HALF:], abs=1e-5)


@pytest.mark.parametrize("name", ["one", pytest.param("fsdp 2", marks=pytest.mark.slow)])
def test_what_was_frozen_may_be_trained_from_a_checkpoint_on(name: str, tmp_path: Path) -> None:
    chosen = {"one": layout(1), **LAYOUTS}[name]
    frozen = {**chosen.overrides, **settings("stage")}
    run_ranks(train, chosen.ranks, chosen.ranks, "vit", frozen, "", str(tmp_path), HALF)
    found = run_ranks(train, chosen.ranks, chosen.ranks, "vit", chosen.overrides, str(tmp_path))[0]
    assert not torch.equal(found.weights["embed.positions"], alone("stage").weights["embed.positions"])
    assert all(weight.isfinite().all() for weight in found.weights.values())


def test_patterns_that_freeze_nothing_or_everything_are_refused() -> None:
    with pytest.raises(UserError, match=r"optim.frozen has 'haed\.\*', which matches no parameter, such as 'weight'"):
        freeze(nn.Linear(2, 2), ("haed.*",))
    with pytest.raises(UserError, match="no parameter to train: all are frozen"):
        freeze(nn.Linear(2, 2), ("*",))
