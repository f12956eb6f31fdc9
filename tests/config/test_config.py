"""Config: strict, typed, with units, and its record loads back to an equal config."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.config import Config, Data, Length, Run, from_yaml, load_overrides, split_arguments, to_yaml
from dltrain.config.describe import describe
from dltrain.config.load import leaves
from dltrain.errors import UserError


def test_the_record_loads_back_to_an_equal_config() -> None:
    overrides = {
        "optim.betas": "0.8,0.95",
        "schedule.milestones": "[1ep, 30st]",
        "run.length": "0.1ep",
        "optim.eps": "1e-7",
    }
    config = load_overrides(Config(), {**overrides, "schedule.name": "step", "precision.compile": "true"})
    assert config.optim.betas == (0.8, 0.95)
    assert config.run.length == Length(Fraction(1, 10), "ep")
    assert config.precision.compile is True
    assert from_yaml(Config, to_yaml(config)) == config


@given(value=st.fractions(0, 1000, max_denominator=100), unit=st.sampled_from(["ep", "h"]))
def test_lengths_survive_their_text(value: Fraction, unit: str) -> None:
    text = f"{float(value):.4f}{unit}"
    assert Length.parse(str(Length.parse(text))) == Length.parse(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.learning_rte": "1"}, "no setting 'optim.learning_rte'; did you mean 'optim.learning_rate'"),
        ({"optm.learning_rate": "1"}, "did you mean 'optim.learning_rate'"),
        ({"optim.learning_rate": "fast"}, r"--optim\.learning_rate is 'fast': .*valid number"),
        ({"optim.learning_rate": "-1"}, "greater than 0"),
        ({"run.length": "10"}, "no known unit; write epochs as '2ep'"),
        ({"run.length": "0.5st"}, "not a whole number of steps"),
        ({"run.length": "0ep"}, r"run\.length is zero"),
        ({"run.length": "1h"}, "cosine needs run.length in epochs or steps"),
        ({"schedule.warmup": "1h"}, r"schedule\.warmup is 1h"),
        ({"logging.every": "1h"}, r"logging\.every is 1h"),
        ({"data.tail": "wrap"}, "'carry', 'drop' or 'pad'"),
        ({"run": "x"}, "'run' is a section, not a setting"),
        ({"optim.learning_rate": "inf"}, "finite"),
        ({"optim.betas": "[0.9"}, "is no list"),
        ({"modle.x": "1"}, "no section 'modle' .*did you mean 'model'"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_key(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_overrides(Config(), overrides)
    assert "\n" not in str(caught.value)


def test_sections_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="forbid"):
        Data(trian="x")  # type: ignore[call-arg]
    assert Config().replace(run=Run(seed=3)).run.seed == 3


def test_the_command_line_is_divided_into_words_and_overrides() -> None:
    words, overrides = split_arguments(["a", "--run.seed", "3", "--nproc", "2", "--data.train=s3://b/x=y"])
    assert (words, overrides) == (["a", "--nproc", "2"], {"run.seed": "3", "data.train": "s3://b/x=y"})
    for bad, message in ((["--run.seed"], "needs a value"), (["--run.seed", "1", "--run.seed", "2"], "given twice")):
        with pytest.raises(UserError, match=message):
            split_arguments(bad)
    assert load_overrides(Config(), {"optim__learning_rate": "0.5"}).optim.learning_rate == 0.5


def test_every_setting_is_documented() -> None:
    text = describe(Config())
    for name, field in leaves(Config).items():
        assert field.description, f"{name} has no documentation"
        assert f"--{name} " in text


def test_intervals_fall_due_when_a_multiple_is_passed() -> None:
    epoch, steps = Length.parse("0.5ep"), Length.parse("3st")
    positions = [0, 4, 8, 12, 16, 20]  # five steps of 4 in epochs of 10: halves end at 5, 10, 15, 20
    due = [epoch.due((s, positions[s]), (s + 1, positions[s + 1]), 10) for s in range(5)]
    assert due == [False, True, True, True, True]
    assert [steps.due((s, 0), (s + 1, 0), 10) for s in range(6)] == [False, False, True, False, False, True]
    assert not Length.parse("0st").due((0, 0), (9, 9), 10)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [("*", ("*",)), ("*.bias, head.*", ("*.bias", "head.*")), ("[a, 'b.*']", ("a", "b.*"))],
)
def test_patterns_are_lists_as_they_are_typed(text: str, patterns: tuple[str, ...]) -> None:
    assert load_overrides(Config(), {"optim.frozen": text}).optim.frozen == patterns
