"""The name that is offered in the place of one that there is not."""

from __future__ import annotations

import pytest

from dltrain.config import Config
from dltrain.config.load import leaves
from dltrain.errors import nearest

SETTINGS = list(leaves(Config))


def section(name: str) -> list[str]:
    return [each for each in SETTINGS if each.startswith(name.partition(".")[0] + ".")]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optim.lr", "optim.learning_rate"),
        ("optim.wd", "optim.weight_decay"),
        ("data.batch_size", "data.global_batch_size"),
        ("optim.rate", "optim.learning_rate"),
        ("optim.learning_rte", "optim.learning_rate"),
        ("data.evalution", "data.evaluation"),
    ],
)
def test_an_abbreviation_a_part_and_a_slip_find_the_setting(name: str, meant: str) -> None:
    assert nearest(name, section(name)) == f"did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["optim.foo", "run.x", "optim.lrx", "data.loader"])
def test_what_resembles_nothing_by_its_own_part_is_offered_nothing(name: str) -> None:
    assert nearest(name, section(name)).startswith(f"there are: {section(name)[0][:4]}")


def test_what_two_settings_are_abbreviated_by_is_offered_both() -> None:
    assert nearest("data.bs", section("data.bs")) == "did you mean 'data.bad_samples' or 'data.global_batch_size'?"


def test_the_section_may_be_wrong_too() -> None:
    assert nearest("optm.lr", SETTINGS) == "did you mean 'optim.learning_rate'?"
    assert nearest("optm.learning_rte", SETTINGS) == "did you mean 'optim.learning_rate'?"


def test_names_without_dots_are_compared_whole() -> None:
    assert nearest("trian", ["train", "eval"]) == "did you mean 'train'?"
    assert nearest("p5.48xlarge", ["ml.p5.48xlarge", "ml.g5.48xlarge"]) == "did you mean 'ml.p5.48xlarge'?"
    assert nearest("x", ["train", "eval"]) == "there are: eval, train"
    assert nearest("x", []) == "there are none"
