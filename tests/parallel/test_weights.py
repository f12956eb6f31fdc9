"""Runs start from weights trained before, the same under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.weights import Weights
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.matrix import CPU, LAYOUTS, Images, share_of, whole


class Held:
    """Tensors in memory."""

    origin = "FILE"

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name.replace("__", "."): value for name, value in tensors.items()}
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 4)


def threes(*shape: int) -> Tensor:
    return torch.full(shape, 3.0)


def test_what_matches_is_filled_in_and_the_rest_is_told() -> None:
    model = Small()
    bias = model.head.bias.detach().clone()
    tensors = Held(body__weight=threes(3, 2).bfloat16(), head__weight=threes(4, 3), old__weight=threes(1))
    match = Weights(tensors).fill(model)
    assert torch.equal(model.body.weight, threes(3, 2))
    assert model.body.weight.dtype == torch.float32
    assert torch.equal(model.head.bias, bias)
    assert match.record() == {
        "origin": "FILE",
        "matched": 2,
        "missing": ["body.bias", "head.bias"],
        "left_over": ["old.weight"],
        "skipped": [],
        "reshaped": [],
    }
    assert str(match).endswith("2 matched, 2 missing (body.bias, head.bias), 1 left over (old.weight), 0 skipped")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "model.model."]
)
def test_prefixes_of_wrappers_do_not_matter_on_either_side(prefix: str) -> None:
    wrapped = Held(**{f"{prefix}{name}": value for name, value in Small().state_dict().items()})
    assert len(Weights(wrapped).fill(Small()).pairs) == 4
    outer = nn.Module()
    outer.backbone = Small()
    assert Weights(Held(**Small().state_dict())).fill(outer).missing == []


def test_one_of_two_names_of_a_tied_weight_is_enough() -> None:
    model = Small()
    model.again = model.head
    match = Weights(Held(**Small().state_dict())).fill(model)
    assert match.missing == []


def test_the_tensor_of_one_name_is_read_by_itself_for_a_model_without_any() -> None:
    with torch.device("meta"):
        model = Small()
    weights = Weights(Held(module__body__weight=threes(3, 2)))
    assert weights.find(model).missing == ["body.bias", "head.weight", "head.bias"]
    assert torch.equal(weights.read("body.weight"), threes(3, 2))
    assert weights.read("head.bias") is None


def test_a_head_of_another_shape_is_refused_with_the_setting_that_leaves_it() -> None:
    tensors = Held(body__weight=threes(3, 2), head__weight=threes(7, 3), head__bias=threes(7))
    words = r"head.weight has shape \(7, 3\) in FILE and \(4, 3\) in the model.*--model.weights_skip 'head\.\*'$"
    with pytest.raises(UserError, match=words):
        Weights(tensors).fill(Small())
    match = Weights(tensors, skip=("head.*",)).fill(Small())
    assert (match.skipped, len(match.reshaped)) == (["head.weight", "head.bias"], 2)
    config = load_overrides(Config(), {"model.weights": "x.pt", "model.weights_skip": "head.*"})
    assert config.model.weights_skip == ("head.*",)


@pytest.mark.parametrize(
    ("tensors", "skip", "words"),
    [
        ({"other": threes(1)}, (), "nothing in FILE has a name of Small: it has 'other', the model 'body.weight'"),
        ({"body.bias": threes(3)}, ("haed.*",), "weights_skip has 'haed.\\*', which matches no name, such as 'body"),
        ({"module.body.bias": threes(3), "model.body.bias": threes(3)}, (), "two tensors for body.bias: module.body"),
        ({"body.bias": threes(3)}, ("body.*",), "nothing in FILE has a name of Small"),
    ],
)
def test_what_cannot_be_meant_is_refused(tensors: dict[str, Tensor], skip: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Weights(Held(**tensors), skip).fill(Small())


def started(rank: int, ranks: int, file: str, overrides: dict[str, Any]) -> dict[str, Tensor]:
    from dltrain.checkpoint.weights import starting_weights

    config = load_overrides(Config(), {**overrides, "model.weights": file, "run.seed": 1})
    environment = Environment(rank, ranks, rank, ranks)
    mesh = build_mesh(config.parallel, environment, CPU)
    weights = starting_weights(config, environment)
    engine = parallelize(Images(config), config, mesh, CPU, lambda: share_of("vit", 0, 0, 1), weights)
    return whole(engine)


@pytest.mark.parametrize("name", ["ddp 2", "fsdp 2", "tp 2", "pp 2, 1f1b"])
def test_every_layout_starts_from_the_same_file_with_the_same_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = {f"module.{name}": value for name, value in Images(Config()).model().state_dict().items()}
    file = str(tmp_path / "vit.safetensors")
    save_file(expected, file)
    layout = LAYOUTS[name]
    found: dict[str, Tensor] = {}
    for each in run_ranks(started, layout.ranks, layout.ranks, file, layout.overrides):
        found |= each
        assert all(torch.equal(value, expected[f"module.{name}"]) for name, value in each.items())
    assert len(found) == len(expected)
