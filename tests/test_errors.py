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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "'optim.learning_rate'"),
        ("seed", "'run.seed'"),
        ("warmup", "'schedule.warmup' or 'optim.ema_warmup'"),
        ("batch_size", "'evaluation.batch_size' or 'data.global_batch_size'"),
        ("learning_rte", "'optim.learning_rate'"),
        ("every", "'checkpoint.every' or 'debugger.every' or 'evaluation.every'"),
    ],
)
def test_a_name_without_a_section_is_compared_with_last_parts(name: str, meant: str) -> None:
    assert nearest(name, SETTINGS) == f"did you mean {meant}?"


def test_equally_near_ones_are_offered_together() -> None:
    assert nearest("sed", ["run.seed", "data.seed", "data.x"]) == "did you mean 'data.seed' or 'run.seed'?"


def test_of_many_candidates_the_nearest_are_listed_and_the_others_counted() -> None:
    said = nearest("ml.p99.foo", [f"ml.{letter}{size}.large" for letter in "abcdp" for size in range(45)])
    assert said.startswith("there are: ml.")
    assert said.endswith(" and 205 more")
    assert said.count(",") + 1 == 20
    assert "ml.p9.large" in said
    assert nearest("epochs", SETTINGS).endswith(f" and {len(SETTINGS) - 20} more")


def test_names_without_dots_are_compared_whole() -> None:
    assert nearest("trian", ["train", "eval"]) == "did you mean 'train'?"
    assert nearest("p5.48xlarge", ["ml.p5.48xlarge", "ml.g5.48xlarge"]) == "did you mean 'ml.p5.48xlarge'?"
    assert nearest("x", ["train", "eval"]) == "there are: eval, train"
    assert nearest("x", []) == "there are none"
