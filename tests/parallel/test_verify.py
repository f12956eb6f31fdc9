"""``dltrain verify``: it passes what is the same, and names what is not."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from dltrain.verification import Bounds, Recorded, compare, stilled
from tests.conftest import TINY, Cli

DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
ZERO = ("image/classify", "--preset", "vit-tiny", "--parallel.engine", "deepspeed", "--parallel.deepspeed.stage", "3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        (
            "image/classify",
            "--preset",
            "vit-tiny",
            "--nproc",
            "4",
            "--parallel.tp",
            "2",
            "--parallel.dp_shard",
            "2",
            "--parallel.sequence",
            "true",
            "--parallel.offload",
            "true",
        ),
        ("image/classify", "--preset", "digits", "--nproc", "2"),
        ("timeseries/forecast", "--preset", "co2-patchtst", "--nproc", "2", "--parallel.dp_shard", "2"),
        pytest.param(ZERO, marks=DEEPSPEED),
    ],
    ids=["fsdp 2 x tp 2, sequence, offload", "ddp 2, dropout and batch norm", "fsdp 2", "deepspeed zero-3"],
)
def test_layouts_of_our_recipes_are_the_same(cli: Cli, words: tuple[str, ...], tmp_path: Path) -> None:
    done = cli("verify", *words, "--steps", "4")
    assert done.status == 0, done.out + done.err
    assert done.result["same"]
    assert 0 < done.result["loss"] + done.result["gradient"] <= 2e-5
    assert not (tmp_path / "runs").exists()  # it leaves nothing behind


@pytest.mark.slow
def test_a_model_that_depends_on_the_layout_is_found(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    text = Path(TINY).read_text()
    head, model, rest = text.partition("    def loss(self")
    assert model
    spoiled = "    def loss(self" + rest.replace("return ", "return (1 + int(os.environ['RANK'])) * ", 1)
    recipe.write_text(head + spoiled)
    done = cli("verify", str(recipe), "--preset", "small", "--nproc", "2", "--steps", "2")
    assert done.status == 1, done.out + done.err
    assert "NOT THE SAME" in done.out
    assert done.result["parameter"] in done.out
    assert "NOT THE SAME: losses within 1e-05, the others 3e-05; gradients depart from 1.weight on" in done.out


def test_nothing_is_left_to_chance() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True),
            "recurrent": nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True),
            "dropout": nn.Dropout(0.5),
            "norm": nn.BatchNorm1d(8),
        }
    )
    stilled(model).train()
    values = torch.randn(3, 5, 8)

    def passed() -> list[torch.Tensor]:
        normed = model["norm"](model["dropout"](values[:, 0]))
        return [model["attention"](values, values, values)[0], model["recurrent"](values)[0], normed]

    first = passed()
    assert all(torch.equal(one, two) for one, two in zip(first, passed(), strict=True))
    assert torch.equal(model["norm"].running_mean, torch.zeros(8))


@pytest.mark.slow
def test_mistakes_are_one_sentence(cli: Cli) -> None:
    for words, sentence in (
        (("image/classify", "--steps", "0"), "--steps is 0; give 1 or more"),
        (("image/classify", "--preset", "digits", "--parallel.tp", "2"), "does not say how to split its layers"),
    ):
        done = cli("verify", *words)
        assert done.status == 2
        assert sentence in done.err
        assert "Traceback" not in done.err


def test_the_parameter_that_departs_furthest_is_named() -> None:
    first = Recorded([1.0, 0.5], [2.0, 1.0], {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([2.0])})
    same = compare(first, first)
    assert (same.loss, same.norm, same.gradient) == (0.0, 0.0, 0.0)
    other = Recorded([1.0, 0.6], [2.0, 1.5], {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([3.0])})
    found = compare(first, other)
    assert (found.loss, found.norm, found.gradient, found.parameter) == (pytest.approx(0.1), 0.5, 0.25, "b")
    assert found.within(Bounds(0.2, 0.6))
    assert not found.within(Bounds(0.05, 0.6))
    assert not found.within(Bounds(0.2, 0.45))  # the norm is further apart
    assert (found.first(Bounds(1, 0.1)), found.first(Bounds(1, 0.3))) == ("b", "")
    both = Recorded([1.0, 0.5], [2.0, 1.0], {"a": torch.tensor([1.0, -3.9]), "b": torch.tensor([3.0])})
    assert (compare(first, both).first(Bounds(1, 0.001)), compare(first, both).parameter) == ("a", "b")
    without = compare(first, Recorded([1.0, 0.5], [2.0, 1.0], {"a": first.gradients["a"]}))
    assert (without.gradient, without.parameter) == (math.inf, "b")
    lost = compare(first, Recorded([1.0, math.nan], [2.0, 1.0], first.gradients))
    assert not lost.within(Bounds(1.0, 1.0))
    ends = [Recorded([1.0], [1.0], first.gradients, {"a": torch.tensor([1.0, value])}) for value in (2.0, 2.5)]
    assert compare(*ends).weight == 0.5


@pytest.mark.slow
def test_a_layout_that_the_recipe_itself_sets_is_compared_too(cli: Cli, tmp_path: Path) -> None:
    text = Path(TINY).read_text()
    recipe = tmp_path / "mine.py"
    recipe.write_text(text.replace("return TinyConfig(", "return TinyConfig(parallel={'dp_shard': 2}, ", 1))
    done = cli("verify", str(recipe), "--preset", "small", "--nproc", "2", "--steps", "2")
    assert done.status == 0, done.out + done.err
