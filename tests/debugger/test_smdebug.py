"""Trials of SageMaker Debugger's are read as its own API reads them; smdebug_output/README.md says what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain import storage
from dltrain.debugger.run import SavedRun, open_run
from dltrain.debugger.smdebug.names import canonical, expression
from dltrain.debugger.smdebug.run import ImportedRun
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

OUTPUT = Path(__file__).parent / "smdebug_output"
EXPECTED: dict[str, Any] = json.loads((OUTPUT / "expected.json").read_text())


def opened(folder: str | Path) -> ImportedRun:
    run = open_run(str(folder))
    assert isinstance(run, ImportedRun)
    return run


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of ``two``, to be damaged, of a training that goes on."""
    shutil.copytree(OUTPUT / "two", tmp_path / "trial")
    (tmp_path / "trial" / "training_job_end.ts").unlink()
    return tmp_path / "trial"


@pytest.mark.parametrize("name", EXPECTED)
def test_steps_names_and_collections_are_those_of_its_own_trials(name: str) -> None:
    run, expected = opened(OUTPUT / name), EXPECTED[name]
    assert run.workers() == expected["workers"]
    assert run.modes() == [mode.lower() for mode in expected["modes"]]
    assert run.steps() == expected["steps"]["GLOBAL"]
    for mode in run.modes():
        assert run.steps(mode) == expected["steps"][mode.upper()]
    assert run.tensor_names() == sorted(map(canonical, expected["tensors"]))
    for collection, names in expected["collections"].items():
        assert run.tensor_names(collection=collection) == [canonical(each) for each in names]
    assert run.tensor_names(kind="gradients") == run.tensor_names(regex="^gradient/")
    assert run.tensor_names(kind="losses") == ["CrossEntropyLoss_output_0"]
    assert run.tensor_names(kind="weights") == ["conv1.bias", "conv1.weight", "head.bias", "head.weight"]


@pytest.mark.parametrize("name", EXPECTED)
def test_values_and_reductions_are_those_of_its_own_trials(name: str) -> None:
    run, checked = opened(OUTPUT / name), 0
    for tensor, expected in EXPECTED[name]["tensors"].items():
        assert run.tensor(tensor).steps == expected["steps"]
        assert run.tensor(tensor, mode="train").steps == expected["train_steps"]
        for step, by_worker in expected["at"].items():
            for worker, at in by_worker.items():
                ours = run.tensor(canonical(tensor), worker)
                assert sorted(ours.kept(int(step))) == sorted(at["kept"])
                for reduction, value in at["kept"].items():
                    assert ours.reduction_value(int(step), reduction) == value
                for reduction, value in at.get("computed", {}).items():
                    assert ours.reduction_value(int(step), reduction) == pytest.approx(value, rel=1e-5, abs=1e-7)
                if "value" in at:
                    assert ours.value(int(step)).tolist() == at["value"]
                checked += len(at["kept"]) + len(at.get("computed", ())) + ("value" in at)
    assert checked > 200


def test_reductions_come_for_all_steps_at_once_kept_or_computed() -> None:
    run = opened(OUTPUT / "one")
    kept = run.tensor("gradient/head.weight")
    assert kept.reductions("abs_mean").tolist() == [kept.reduction_value(step, "abs_mean") for step in kept.steps]
    assert kept.reductions("variance") == pytest.approx(kept.reductions("std") ** 2)
    raw = run.tensor("relu_output_0", mode="train")
    assert sorted(raw.values()) == raw.steps == [0, 2, 4, 6, 8]
    assert raw.reductions("fraction_zero").tolist() == [float((each == 0).mean()) for each in raw.values().values()]
    assert raw.reductions("max").tolist() == [float(each.max()) for each in raw.values().values()]


def test_each_worker_has_values_of_its_own_and_the_first_is_read_unless_another_is_named() -> None:
    run = opened(OUTPUT / "two")
    first, second = (run.tensor("relu_output_0", worker).value(2) for worker in run.workers())
    assert not np.array_equal(first, second)
    assert np.array_equal(run.tensor("relu_output_0").value(2), first)


def test_scalars_are_those_of_training() -> None:
    steps, rates = opened(OUTPUT / "one").scalars("rate")
    assert steps.tolist() == [0, 2, 6, 8, 10, 11]
    assert rates == pytest.approx([0.5 / (1 + step) for step in (0, 2, 4, 6, 8, 9)])
    steps, losses = opened(OUTPUT / "one").scalars("loss")
    expected = EXPECTED["one"]["tensors"]["CrossEntropyLoss_output_0"]["at"]
    assert losses.tolist() == [expected[str(int(step))]["worker_0"]["value"] for step in steps]


def test_rules_judge_it_as_far_as_what_was_kept_allows() -> None:
    run = opened(OUTPUT / "one")
    assert not list(run.judge(["default"]))
    words = [
        "VanishingGradient:threshold=1",
        "LossNotDecreasing:num_steps=1:diff_percent=99",
        "Overfit:ratio_threshold=-9",
    ]
    found = list(run.judge([*words, "DeadRelu:threshold_layer=0", "TensorVariance:max_threshold=1e-9"]))
    # steps of ReLUs alone lie between, and do not say that gradients are well again
    assert [each.step for each in found if each.rule == "VanishingGradient"] == [0], (
        "steps of ReLUs alone change nothing"
    )
    assert {each.rule for each in found} >= {"LossNotDecreasing", "Overfit", "TensorVariance"}
    weights = {place for each in found if each.rule == "TensorVariance" for place in each.where}
    assert weights >= {"conv1.weight", "head.weight"}
    updates = list(run.judge(["WeightUpdateRatio:large_threshold=1e-9"]))
    assert set(updates[0].where) == {"conv1.bias", "head.bias"}, "of biases alone the values were kept"
    assert updates[0].step == 6, "the step before it, 4, is one of an evaluation"


def test_a_rule_that_needs_what_was_not_kept_is_refused_by_name(copy: Path) -> None:
    run = opened(OUTPUT / "one")
    for word, needs in (
        ("LossScaleCollapse", "the loss scale"),
        ("SaturatedActivation", "values of inputs of tanh or sigmoid"),
        ("AllZero:threshold=50", "values of gradients"),
    ):
        with pytest.raises(UserError, match=f"rule {word.partition(':')[0]} needs {needs}"):
            list(run.judge([word]))
    assert not list(run.judge(["AllZero"])), "whether all are 0 the largest tells"
    with pytest.raises(UserError, match="has no rule 'VanishingGradients'; did you mean 'VanishingGradient'"):
        list(run.judge(["VanishingGradients"]))


def test_what_is_missing_or_half_written_is_a_step_that_is_not_complete(copy: Path) -> None:
    assert opened(copy).steps() == [0, 2, 4, 6, 7]
    last = copy / "events" / "000000000007" / "000000000007_worker_1.tfevents"
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    run = opened(copy)
    assert run.steps() == [0, 2, 4, 6]
    index = copy / "index" / "000000000" / "000000000006_worker_0.json"
    index.write_text(index.read_text()[:50])
    assert opened(copy).steps() == [0, 2, 4]
    with pytest.raises(UserError, match="has no steps 7"):
        run.wait_for_steps([0, 7], timeout=0.0)
    last.write_bytes(data)
    run.wait_for_steps([0, 4], timeout=0.0)
    run.refresh()
    run.wait_for_steps([7], timeout=0.0)


def test_a_damaged_record_is_told(copy: Path) -> None:
    file = copy / "events" / "000000000000" / "000000000000_worker_0.tfevents"
    data = bytearray(file.read_bytes())
    data[:4] = b"\xff\xff\xff\x00"
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"worker_0.tfevents ends within a record"):
        opened(copy).tensor("conv1.weight").reductions("mean")


def test_a_trial_on_s3_is_read(s3: S3Server) -> None:
    for path in (OUTPUT / "two").rglob("*"):
        if path.is_file():
            storage.write(f"s3://data/debug-output/{path.relative_to(OUTPUT / 'two')}", path.read_bytes())
    run, here = opened("s3://data/debug-output"), opened(OUTPUT / "two")
    assert run.steps() == here.steps()
    for name in here.tensor_names(kind="gradients"):
        assert run.tensor(name).reductions("abs_mean").tolist() == here.tensor(name).reductions("abs_mean").tolist()
    assert np.array_equal(run.tensor("relu_output_0").value(4), here.tensor("relu_output_0").value(4))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    run = opened(OUTPUT / "one")
    for ask, words in (
        (lambda: run.tensor("head.wait"), "has no tensor 'head.wait'; did you mean 'head.weight'"),
        (lambda: run.tensor("head.weight", "worker_7"), "has no worker 'worker_7'; did you mean 'worker_0'"),
        (
            lambda: run.tensor("head.weight").value(0),
            "head.weight at step 0 were not kept: there is min, max",
        ),
        (lambda: run.tensor("head.weight").reductions("prod"), "there is no reduction 'prod'"),
        (lambda: run.tensor("head.weight").reductions("abs_min"), "head.weight has no abs_min at step 0"),
        (lambda: run.tensor("head.weight").reduction_value(2, "max"), "has nothing of step 2; it has 0, 4, 6, 10"),
        (lambda: run.steps("predict"), "has no mode 'predict'"),
        (lambda: run.tensor_names(collection="weight"), "has no collection 'weight'; did you mean 'weights'"),
        (lambda: run.scalars("rote"), "has no scalar 'rote'; did you mean 'rate'"),
    ):
        with pytest.raises(UserError, match=words):
            ask()
    with pytest.raises(UserError, match="has no statistics"):
        SavedRun(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ResNet_conv1.weight", "conv1.weight"),
        ("gradient/ResNet_layer1.0.conv1.weight", "gradient/layer1.0.conv1.weight"),
        ("gradient/DistributedDataParallel_module.fc.bias", "gradient/fc.bias"),
        ("DistributedDataParallel_module._fsdp_wrapped_module.fc.bias", "fc.bias"),
        ("OptimizedModule__orig_mod.fc.bias", "fc.bias"),
        ("module.layer1.relu_output_0", "layer1.relu_output_0"),
        ("layer1.module.relu_output_0", "layer1.module.relu_output_0"),
        ("CrossEntropyLoss_output_0", "CrossEntropyLoss_output_0"),
        ("scalar/Rate_now", "scalar/Rate_now"),
        ("head.weight", "head.weight"),
    ],
)
def test_names_lose_classes_and_wrappers(name: str, ours: str) -> None:
    assert canonical(name) == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("^ResNet_conv1.*weight", "^conv1.*weight"),
        ("gradient/ResNet_", "gradient/"),
        (r"DistributedDataParallel_module\.layer1\.", r"layer1\."),
        ("(Net_a|Net_b)", "(a|b)"),
        (r"^module\.fc", "^fc"),
        (r"_fsdp_wrapped_module\.fc", "fc"),
        ("CrossEntropyLoss_output", "CrossEntropyLoss_output"),
        ("[A-Z_]+weight", "[A-Z_]+weight"),
        (r"\S_weight", r"\S_weight"),
        ("relu_output", "relu_output"),
    ],
)
def test_expressions_lose_them_where_they_are_written_out(theirs: str, ours: str) -> None:
    assert expression(theirs) == ours
