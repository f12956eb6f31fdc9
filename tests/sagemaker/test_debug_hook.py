"""SageMaker Debugger's configuration becomes settings of our debugger; what cannot is told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.config import Collection, Config, Debugger, Length
from dltrain.debugger.run import open_run
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.debug_hook import apply_debug_hook
from tests.conftest import TINY, Cli

NOTHING = Debugger()
Words = tuple[str, ...]


def steps(number: int) -> Length:
    return Length.parse(f"{number}st")


def collection(name: str, **parameters: str) -> dict[str, Any]:
    return {
        "CollectionName": name,
        "CollectionParameters": {key.replace("__", "."): v for key, v in parameters.items()},
    }


def request(*collections: dict[str, Any], **hook: str) -> dict[str, Any]:
    """As SageMaker writes it."""
    parameters = {key.replace("__", "."): value for key, value in hook.items()}
    tree = {"S3OutputPath": "s3://bucket/job", "LocalPath": "/opt/ml/output/tensors", "HookParameters": parameters}
    return {**tree, "CollectionConfigurations": list(collections)}


def rule(name: str, **parameters: str) -> dict[str, Any]:
    return {"RuleConfigurationName": name, "RuleParameters": {"rule_to_invoke": name, **parameters}}


class Place:
    """A folder like /opt/ml with a configuration."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "ml"
        self.file = self.base / "input" / "config" / "debughookconfig.json"
        self.file.parent.mkdir(parents=True)

    def read(self, tree: Any, debugger: Debugger = NOTHING, given: Words = (), **variables: str) -> Debugger:
        self.file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return self.settings(debugger, given, SAGEMAKER_BASE_DIR=str(self.base), **variables)

    def settings(self, debugger: Debugger, given: Words = (), **variables: str) -> Debugger:
        return apply_debug_hook(Config(debugger=debugger), given, Environment(), variables).debugger


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"S3OutputPath": "s3://bucket/job", "CollectionConfigurations": []},
        {"LocalPath": "/opt/ml/output/tensors", "HookParameters": None, "CollectionConfigurations": None},
        request(collection("losses")),
        request(save_interval="100"),
    ],
)
def test_what_the_sdk_sends_by_default_switches_nothing_on(
    place: Place, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.read(tree) == Debugger()
    assert not capsys.readouterr().err


def test_without_a_file_nothing_is_changed(place: Place) -> None:
    config = Config()
    assert apply_debug_hook(config, (), Environment(), {"SAGEMAKER_BASE_DIR": str(place.base)}) is config


def test_collections_become_kinds_and_their_steps(place: Place) -> None:
    read = place.read(request(collection("gradients", save_interval="100"), collection("weights"), save_interval="100"))
    assert read == Debugger(every=steps(100), collect=("gradients", "weights"))
    assert place.read(request(collection("gradients"))).every == steps(500), "the default of its rules"
    own = place.read(request(collection("gradients"), collection("weights"), collection("biases", save_interval="7")))
    assert own.every == steps(500)
    assert own.collections == {"biases": Collection(every=steps(7))}
    assert place.read(request(save_all="true")).collect == ("all",)
    assert place.read(request(collection("relu_output"))).collect == ("activations",)
    assert place.read(request(collection("mine", include_regex=".*relu_output"))).collect == ("activations",)


def test_steps_count_from_one_here_and_replace_the_interval(place: Place) -> None:
    read = place.read(request(collection("gradients", save_steps="0, 10,20", save_interval="3")))
    assert read.steps == (1, 11, 21)
    late = place.read(request(collection("gradients", start_step="10", end_step="99")))
    assert (late.start, late.end, late.every) == (11, 100, steps(500))
    both = request(collection("gradients", save_interval="3"), save_steps="5")
    assert place.read(both).steps == (), "the collection's own interval comes before steps of all"


def test_training_has_its_own_steps_and_evaluations_switch_theirs_on(place: Place) -> None:
    read = place.read(
        request(collection("gradients", save_interval="9", train__save_interval="4", global__end_step="8"))
    )
    assert (read.every, read.end, read.evaluation) == (steps(4), 9, False)
    assert place.read(request(collection("relu_output", eval__save_interval="1"))).evaluation


def test_a_collection_given_twice_is_one(place: Place) -> None:
    """As when a rule brings its own beside the user's, which it overrode in silence."""
    read = place.read(
        request(collection("gradients", save_interval="50"), collection("gradients", save_interval="500"))
    )
    assert read == Debugger(every=steps(50), collect=("gradients",))
    twice = [collection("mine", include_regex="Net_a,b", save_interval=n) for n in ("8", "4")]
    twice.append(collection("mine", include_regex="c", save_raw_tensor="True"))
    read = place.read(request(*twice))
    assert read.collections == {"mine": Collection(include=("a", "b", "c"), every=steps(4), raw=True)}
    assert not read.every, "nothing else is asked for"


def test_names_lose_classes_and_wrappers(place: Place) -> None:
    regex = r"gradient/ResNet_conv1,DistributedDataParallel_module\.fc,relu_input"
    read = place.read(request(collection("mine", include_regex=regex, save_histogram="true")))
    assert read.collections["mine"].include == ("gradient/conv1", "fc", "relu_input")
    assert read.collections["mine"].histograms
    assert place.read(request(include_regex="ResNet_fc", save_interval="2")).collections["default"].include == ("fc",)
    assert place.read(request(collection("relu_input"))).collections["relu_input"].include == (r"relu\d*_input_",)


def test_rules_become_words(place: Place, tmp_path: Path) -> None:
    rules = [
        rule("VanishingGradient", threshold="1e-6"),
        rule("AllZero", collection_names="weights, gradients"),
        rule("LossNotDecreasing"),
    ]
    words = ("VanishingGradient:threshold=1e-6", "AllZero:collection_names=weights+gradients", "LossNotDecreasing")
    hook = request(collection("losses", save_interval="20"))
    assert place.read({"DebugHookConfig": hook, "DebugRuleConfigurations": rules}) == Debugger(
        every=steps(20), rules=words
    )
    assert place.read({**hook, "DebugRuleConfigurations": rules}).rules == words
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    alone = place.settings(Debugger(config=str(tmp_path / "rules.json")))
    assert (alone.rules, alone.every) == (words, steps(500))


def test_what_is_given_wins(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {**request(collection("gradients", save_steps="5")), "DebugRuleConfigurations": [rule("AllZero")]}
    assert place.read(tree, Debugger(every=steps(10)), ("debugger.every",)) == Debugger(
        every=steps(10), collect=("gradients",), rules=("AllZero",)
    )
    preset = Debugger(collect=("weights",), rules=("LossSpike",))
    assert place.read(tree, preset) == preset.replace(every=steps(500), steps=(6,))
    assert place.read(tree, Debugger(), ("debugger__rules",)).rules == ("default",)
    for off in (
        place.read(tree, Debugger(), ("debugger.every",)),
        place.read(tree, Debugger(config="off")),
        place.read(tree, Debugger(), USE_SMDEBUG="0"),
    ):
        assert not off.on
    assert not capsys.readouterr().err


def test_the_file_may_lie_elsewhere(place: Place, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(request(collection("weights"))))
    other = str(tmp_path / "other.json")
    there = place.read(request(collection("gradients")), SMDEBUG_CONFIG_FILE_PATH=other)
    assert there.collect == ("weights",)
    assert place.read(request(), Debugger(config=other)).collect == ("weights",)
    with pytest.raises(UserError, match=r"debugger.config names 'nowhere.json', and there is no such file"):
        place.settings(Debugger(config="nowhere.json"))


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ("{", "is not JSON"),
        ("3", "is no mapping, as debughookconfig.json is, nor a list of rules"),
        (request() | {"HookParameter": {}}, "'HookParameter', which is passed over; did you mean 'HookParameters'"),
        (request() | {"HookParameters": "x"}, 'has no mapping in HookParameters, but "x"'),
        (request() | {"CollectionConfigurations": {"a": 1}}, 'no list in CollectionConfigurations, but {"a": 1}'),
        (
            request() | {"CollectionConfigurations": ["weights"]},
            'has "weights" in CollectionConfigurations, which',
        ),
        (request(save_intervall="3"), "'save_intervall' ('3') in HookParameters, which is passed over; did you mean "),
        (request(collection("gradient")), "a collection 'gradient' without include_regex, and it is left out; did you"),
        (
            request(collection("mine", include_regex="(")),
            "'include_regex' ('(') in CollectionParameters of 'mine', which",
        ),
        (
            request(collection("weights", save_interval="often")),
            "('often') in CollectionParameters of 'weights', which is",
        ),
        (request(collection("weights", save_interval="0")), "which is no whole number of at least 1"),
        (request(collection("weights", save_steps="1;2")), "steps are whole numbers with commas between"),
        (request(collection("weights", save_raw_tensor="yes")), "neither true nor false"),
        (request(collection("weights", reductions="min,prod")), "where 'prod' is left out"),
        (
            [rule("VanishingGradients")],
            "a rule 'VanishingGradients', which is left out; did you mean 'VanishingGradient'",
        ),
        ([rule("AllZero", treshold="3")], "has no parameter 'treshold'; did you mean 'threshold'?; it is left out"),
        ([rule("AllZero", threshold="high")], "threshold of rule AllZero is 'high'"),
        ([{"RuleParameters": {}}], "a rule without RuleParameters that name a rule_to_invoke"),
        ([rule("AllZero", action_json='{"name": "email"}')], "gives AllZero an action 'email', which is left out"),
    ],
)
def test_what_cannot_be_carried_over_is_told_once_and_the_rest_is(
    place: Place, tree: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(tree, dict) and isinstance(tree.get("CollectionConfigurations"), list):
        tree["CollectionConfigurations"].append(collection("gradients", save_interval="7"))
    read = place.read(tree)
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1
    assert sentence in told
    if isinstance(tree, dict) and isinstance(tree.get("CollectionConfigurations"), list):
        assert "gradients" in read.collect
    with pytest.raises(UserError, match=r"debughookconfig.json"):
        place.read(tree, Debugger(strict=True))


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_job_of_sagemaker_debuggers_runs_as_it_is(cli: Cli, place: Place, tmp_path: Path, ranks: str) -> None:
    hook = request(collection("gradients", save_interval="4"), collection("gradients", save_interval="500"))
    rules = [rule("VanishingGradient", threshold="1e9")]
    place.file.write_text(json.dumps({**hook, "DebugRuleConfigurations": rules}))
    done = cli("train", TINY, "--preset", "small", "--nproc", ranks, SAGEMAKER_BASE_DIR=str(place.base))
    assert done.status == 0, done.err
    run = open_run(str(tmp_path / done.result["run"]))
    assert run.steps() == [1, 4, 8, 12, 16]
    assert run.tensor_names() == run.tensor_names(kind="gradients") != []
    assert [each.rule for each in run.findings()] == ["VanishingGradient"]
