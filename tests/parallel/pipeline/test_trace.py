"""A model that brings no chain is cut by what its forward does, or refused with the line that cannot be traced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.models.vision import vit
from dltrain.parallel.pipeline.discover import discovered
from dltrain.parallel.pipeline.parts import part
from dltrain.parallel.pipeline.trace import traced
from dltrain.parallel.plan import Plan
from dltrain.testing.ranks import RankError, run_ranks
from tests.parallel.matrix import HALF, LAYOUTS, Skipping, train

IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("own", "pp 2, zb-v"),
        ("straight", "pp 2, 1f1b"),
        pytest.param("own", "pp 2 x fsdp 2", marks=pytest.mark.slow),
        pytest.param("own", "pp 2, interleaved 1f1b", marks=pytest.mark.slow),
        pytest.param("own", "pp 2 x replicas 2", marks=pytest.mark.slow),
        pytest.param("straight", "pp 2 x fsdp 2, zb-v", marks=pytest.mark.slow),
    ],
)
def test_someones_own_model_gives_the_numbers_of_one_process(family: str, name: str) -> None:
    expected, layout = run_ranks(train, 1, 1, family, {})[0], LAYOUTS[name]
    found = run_ranks(train, layout.ranks, layout.ranks, family, layout.overrides)
    for each in found:
        assert each.losses == pytest.approx(expected.losses, abs=1e-5)
        assert each.norms == pytest.approx(expected.norms, rel=1e-4)
        assert not each.evaluated or each.evaluated == pytest.approx(expected.evaluated, abs=1e-4)
    assert {name for each in found for name in each.weights} == expected.weights.keys()


UNUSED = [
    ("fsdp 2", {"optim.ema": 0.9}, True),
    ("pp 2, zb-v", {}, False),
    ("pp 2 x fsdp 2", {"optim.ema": 0.9}, True),
]


@pytest.mark.parametrize(
    ("name", "more"),
    [pytest.param(*case[:2], marks=[pytest.mark.slow] if case[2] else [], id=case[0]) for case in UNUSED],
)
def test_what_the_forward_has_no_use_for_stays_as_it_is_and_is_saved(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    layout, expected = LAYOUTS[name], run_ranks(train, 1, 1, "wasteful", more)[0]
    settings = {**layout.overrides, **more}
    run_ranks(train, layout.ranks, layout.ranks, "wasteful", settings, "", str(tmp_path), HALF)
    for overrides, ranks in ((settings, layout.ranks), (more, 1)):
        found = run_ranks(train, ranks, ranks, "wasteful", overrides, str(tmp_path))
        assert found[0].losses == pytest.approx(expected.losses[HALF:], abs=1e-5)
        weights = {name: value for each in found for name, value in each.weights.items()}
        assert weights.keys() == expected.weights.keys()
        for key in expected.weights:
            if key.startswith("idle"):
                assert torch.equal(weights[key], expected.weights[key])


def test_a_chain_is_found_where_the_forward_is_one() -> None:
    whole = vit.ViT(8, 4, 3, 5, depth=3, width=32, heads=4)
    # a block adds what went in, so it is not taken apart; the embedding and the head do more than call modules
    assert discovered(whole, (IMAGES,)) == ("embed", "blocks.0", "blocks.1", "blocks.2", "head")
    nested = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(256, 2))))
    assert discovered(nested, (IMAGES,)) == ("0", "1.0", "1.1.0", "1.1.1")
    assert discovered(Skipping(), (IMAGES,)) == ()
    twice = nn.Linear(4, 4)
    assert discovered(nn.Sequential(twice, nn.Sequential(twice)), (torch.zeros(1, 4),)) == ()


def test_traced_stages_one_after_another_are_the_model_in_both_modes() -> None:
    whole = Skipping()
    whole.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5))  # type: ignore[assignment]
    stages = traced(whole, (IMAGES,), ["blocks.1", "blocks.3", "head"])
    assert len(stages) == 4
    for mode in (True, False):
        whole.train(mode)
        values = (IMAGES,)
        for stage in stages:
            stage.train(mode)
            returned = stage(values, (IMAGES,))
            values = returned if isinstance(returned, tuple) else (returned,)
        torch.testing.assert_close(values[0], whole(IMAGES))


class Deciding(Skipping):
    """Its forward asks what a value is."""

    def forward(self, images: Tensor) -> Tensor:
        values = self.stem(images)
        if values.sum() > 0:  # here
            values = -values
        for block in self.blocks:
            values = values + block(values)
        logits: Tensor = self.head(values.mean((2, 3)))
        return logits


def test_the_line_that_cannot_be_traced_is_told() -> None:
    with pytest.raises(UserError) as error:
        traced(Deciding(), (IMAGES,), ["blocks.2"])
    assert re.search(r"line \d+ of test_trace.py \(if values.sum\(\) > 0:  # here\) cannot be traced", str(error.value))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parallel.meta": True}, "parallel.meta is true, and parallel.pp cuts Idle by tracing"),
        ({"precision.batch_norm": "synchronised"}, "precision.batch_norm is synchronised, and parallel.pp cuts"),
    ],
)
def test_what_goes_by_modules_is_refused_before_a_trace(more: dict[str, Any], words: str) -> None:
    with pytest.raises(RankError, match=words):
        run_ranks(train, 2, 2, "wasteful", {"parallel.pp": 2, **more})


class Counting(Skipping):
    """Writes into a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(images.mean())  # type: ignore[operator, union-attr]
        return super().forward(images - self.mean)  # type: ignore[operator]


def test_a_trace_that_is_not_the_model_is_refused() -> None:
    model = Counting()
    with pytest.raises(UserError, match=r"cuts Counting by tracing .* into stages that are wrong"):
        traced(model, (IMAGES,), ["blocks.2"])
    assert model.training


def test_a_model_without_blocks_is_told_how_to_name_them() -> None:
    bare = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"the plan of Linear finds no modules .*; name its blocks in Plan\(units"):
        part(bare, Plan.auto(bare), Parallel(pp=2), 0, 16, lambda samples: (torch.zeros(samples, 4),), lambda: None)


def test_a_model_with_too_few_blocks_is_told() -> None:
    shallow = Skipping()
    with pytest.raises(UserError, match="the pipeline has 8 stages, and the plan of Skipping finds 5 modules"):
        part(
            shallow,
            Plan.auto(shallow),
            Parallel(pp=8),
            0,
            16,
            lambda samples: (torch.zeros(samples, 3, 8, 8),),
            lambda: None,
        )
