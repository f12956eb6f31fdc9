"""Every rule fires where its fault is, at the step where it is, and is silent where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dltrain.debugger.findings import Finding
from dltrain.debugger.histograms import counts_of
from dltrain.debugger.moments import moments_of
from dltrain.debugger.recorder import Guard, Recorder
from dltrain.debugger.rules.base import Rule, Watch
from dltrain.debugger.rules.catalogue import PROFILER, RULES, build
from dltrain.debugger.run import SavedRun, open_run
from dltrain.debugger.sampler import name_of
from dltrain.debugger.seen import Index, Seen, Tensors, kind_of
from dltrain.debugger.store import SCALARS
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.runtime.step_clock import PARTS

Change = Callable[[dict[str, torch.Tensor], int], Any]
STEPS = 40


def healthy(step: int) -> dict[str, torch.Tensor]:
    """Tensors of a model of two layers that learns."""
    generator = torch.Generator().manual_seed(step)
    found = {"active/relu": torch.full((20,), 0.5), "unsaturated/tanh": torch.ones(20)}
    found |= {f"{name}_input_0": torch.randn(8, 20, generator=generator) for name in ("relu", "tanh")}
    found |= {"channels/conv_input_0": torch.tensor([0.01, -0.02, 0.0]), "labels/cls": torch.tensor([400.0, 300.0])}
    found |= {"images/conv_input_0": torch.tensor([600.0])}
    found |= {"tokens/0/embed_input_0": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    for layer in ("one.weight", "two.weight", "three.weight"):
        weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * (0.1 + 0.001 * step)
        found[layer] = weight
        found[name_of("gradients", layer)] = 0.01 * torch.randn(20, 30, generator=generator)
        found[name_of("updates", layer)] = 1e-4 * torch.randn(20, 30, generator=generator)
    return found


def sample(**changes: Any) -> dict[str, Any]:
    """Of a machine that is used well."""
    gpus = [{"used": 90.0, "memory": 50.0}, {"used": 92.0, "memory": 50.0}]
    rates = dict.fromkeys(("read", "written", "sent", "received"), 1000)
    busy = {"cpu": 60.0, "core": 80.0, "io_wait": 1.0, "memory": 30.0, "resident": 10**9}
    return {"time": 0.0, **busy, **rates, "workers": 4, "cores": 4, "gpus": gpus, **changes}


def timeline(step: int, **changes: list[float]) -> dict[str, Any]:
    """Of two ranks whose steps are spent well."""
    seconds = {"data_wait": [0.01, 0.01], "forward": [0.1, 0.1], "backward": [0.2, 0.2], "communication": [0.02, 0.02]}
    seconds |= {part: [0.0, 0.0] for part in PARTS if part not in seconds}
    return {"of": step - 1, "seconds": {**seconds, **changes}, "bubble": 0.2}


def hard(step: int, bad: int) -> dict[str, float]:
    """Losses of a hundred samples, the first of which are never learnt."""
    return {f"s{place}": 4.0 if place < bad else 3 * 0.95**step for place in range(100)}


OBSERVED: dict[str, Callable[[int], Any]] = {
    "system": lambda step: [sample()] * 5,
    "timeline": timeline,
    "replicas": lambda step: "",
    "initialization": lambda step: 30.0,
    "confusion": lambda step: {"matrix": [[300, 5], [9, 300]], "names": ["cat", "dog"]},
    "losses": lambda step: hard(step, 0),
}
"""What a healthy run shows: the first ones at due steps, the last ones after evaluations."""


def history(
    change: Change | None = None,
    losses: Callable[[int], float] | None = None,
    observed: dict[str, Callable[[int], Any]] | None = None,
    **more: Any,
) -> Iterable[Seen]:
    """Forty steps, tensors on every second one, an evaluation after every tenth."""
    shown = {**OBSERVED, **(observed or {})}
    for step in range(1, STEPS + 1):
        tensors = healthy(step)
        if change is not None:
            change(tensors, step)
        index = Index(list(tensors))
        rows = moments_of(list(tensors.values())).numpy()
        counts = {name: counts_of(each).numpy() for name, each in tensors.items() if kind_of(name) == "gradients"}
        loss = 3 * 0.95**step if losses is None else losses(step)
        scalars = {"time": 1000.0 + step, "norm": 1.0, "learning_rate": 0.1}
        scalars |= {name: value(step) for name, value in more.items() if name != "held_out"}
        due = step % 2 == 0
        found = {kind: shown[kind](step) for kind in ("system", "timeline", "replicas") if due}
        found |= {"initialization": shown["initialization"](step)} if step == 1 else {}
        yield Seen(step, loss=loss, tensors=Tensors(index, rows, counts) if due else None, observed=found, **scalars)
        if step % 10 == 0:
            held_out = more.get("held_out", lambda step: 3 * 0.95**step)
            scores = {"loss": held_out(step), "accuracy": 0.5}
            found = {kind: shown[kind](step) for kind in ("confusion", "losses")}
            yield Seen(step, time=1000.0 + step, scores=scores, observed=found)


def judged(words: list[str], seen: Iterable[Seen]) -> list[Finding]:
    told: list[str] = []
    watch = Watch(build(words), told.append)
    found = [each for one in seen for each in watch.update(one)]
    assert not told
    return found


def scaled(name: str, factor: float, since: int) -> Change:
    def change(tensors: dict[str, torch.Tensor], step: int) -> None:
        if step >= since:
            tensors[name] = tensors[name] * factor

    return change


def put(name: str, value: float, since: int) -> Change:
    def change(tensors: dict[str, torch.Tensor], step: int) -> None:
        if step >= since:
            tensors[name] = tensors[name].clone()
            tensors[name][0, 0] = value

    return change


def still(tensors: dict[str, torch.Tensor], step: int) -> None:
    if step > 20:
        tensors["two.weight"] = healthy(20)["two.weight"]


def replaced(name: str, value: torch.Tensor, since: int) -> Change:
    def change(tensors: dict[str, torch.Tensor], step: int) -> None:
        if step >= since:
            tensors[name] = value

    return change


def since(kind: str, first: int, before: Any, after: Any) -> dict[str, Callable[[int], Any]]:
    return {kind: lambda step: after if step >= first else before}


CONFUSED = {"matrix": [[300, 5], [240, 60]], "names": ["cat", "dog"]}

FAULTS: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "VanishingGradient": (
        "VanishingGradient", {"change": scaled("gradient/one.weight", 1e-7, 11)}, 12, ("gradient/one.weight",)),
    "ExplodingTensor": ("ExplodingTensor", {"change": put("two.weight", math.inf, 7)}, 8, ("two.weight",)),
    "ExplodingTensor, NaN": (
        "ExplodingTensor:only_nan=true", {"change": put("two.weight", math.nan, 7)}, 8, ("two.weight",)),
    "WeightUpdateRatio, large": (
        "WeightUpdateRatio", {"change": scaled("update/one.weight", 1e6, 13)}, 14, ("one.weight",)),
    "WeightUpdateRatio, small": (
        "WeightUpdateRatio", {"change": scaled("update/one.weight", 1e-7, 13)}, 14, ("one.weight",)),
    "UnevenUpdates": ("UnevenUpdates", {"change": scaled("update/one.weight", 1e5, 13)}, 16, ("one.weight",)),
    "AllZero": ("AllZero", {"change": scaled("gradient/two.weight", 0.0, 5)}, 6, ("gradient/two.weight",)),
    "DeadRelu": ("DeadRelu", {"change": scaled("active/relu", 0.0, 15)}, 16, ("relu",)),
    "SaturatedActivation": (
        "SaturatedActivation:threshold_layer=90", {"change": scaled("unsaturated/tanh", 0.0, 15)}, 16, ("tanh",)),
    "TensorVariance": (
        "TensorVariance:max_threshold=1", {"change": scaled("one.weight", 20.0, 9)}, 10, ("one.weight",)),
    "UnchangedTensor": ("UnchangedTensor", {"change": still}, 24, ("two.weight",)),
    "LossNotDecreasing": ("LossNotDecreasing", {"losses": lambda step: max(1.0, 2 - step / 10)}, 30, ()),
    "LossNotDecreasing, rising": (
        "LossNotDecreasing", {"losses": lambda step: 1.0 if step <= 20 else 1.2}, 20, ()),
    "LossSpike": ("LossSpike:window=20", {"losses": lambda step: 1 / step + (step == 33)}, 33, ()),
    "Overfit": ("Overfit:patience=2", {"held_out": lambda step: 1.0}, 40, ()),
    "Overtraining": (
        "Overtraining:patience_train=2:patience_validation=2",
        {"losses": lambda step: 1.0, "held_out": lambda step: 1.0}, 30, ()),
    "StalledTrainingRule": (
        "StalledTrainingRule", {"time": lambda step: 1000.0 + step + 2000 * (step >= 17)}, 17, ()),
    "LossScaleCollapse": (
        "LossScaleCollapse", {"loss_scale": lambda step: 65536.0 if step < 20 else 8.0}, 20, ()),
    "PoorWeightInitialization, variances": (
        "PoorWeightInitialization", {"change": scaled("relu_input_0", 10.0, 5)}, 6, ("relu_input_0", "tanh_input_0")),
    "PoorWeightInitialization, gradients": (
        "PoorWeightInitialization", {"change": scaled("gradient/one.weight", 1e-3, 5)}, 6, ("gradient/one.weight",)),
    "PoorWeightInitialization, loss": ("PoorWeightInitialization", {"losses": lambda step: 2.0}, 12, ("loss",)),
    "ReplicaDivergence": (
        "ReplicaDivergence", {"observed": since("replicas", 13, "", "head.weight differs between ranks 0 and 1")},
        14, ()),
    "ClassImbalance": (
        "ClassImbalance", {"change": replaced("labels/cls", torch.tensor([900.0, 20.0]), 9)}, 10, ("labels/cls",)),
    "ClassImbalance, mispredicted": (
        "ClassImbalance", {"observed": since("confusion", 20, OBSERVED["confusion"](0), CONFUSED)}, 20, ("class dog",)),
    "Confusion": (
        "Confusion", {"observed": since("confusion", 30, OBSERVED["confusion"](0), CONFUSED)}, 30, ("class dog",)),
    "CheckInputImages": (
        "CheckInputImages", {"change": replaced("channels/conv_input_0", torch.tensor([0.0, 0.4]), 3)}, 4,
        ("channels/conv_input_0",)),
    "NLPSequenceRatio": (
        "NLPSequenceRatio", {"change": replaced("tokens/0/embed_input_0", torch.tensor([1.0, 1.0, 0.0]), 7)}, 8,
        ("tokens/0/embed_input_0",)),
    "LabelNoise": ("LabelNoise", {"observed": {"losses": lambda step: hard(step, 3)}}, 40, ("s0", "s1", "s2")),
    "MaxInitializationTime": ("MaxInitializationTime", {"observed": {"initialization": lambda step: 1500.0}}, 1, ()),
    "StepOutlier": (
        "StepOutlier:n_outliers=2",
        {"time": lambda step: 1000.0 + step + 30 * sum(late <= step for late in (15, 23, 36))}, 36, ()),
    "DataWait": (
        "DataWait", {"observed": {"timeline": lambda step: timeline(step, data_wait=[0.5, 0.6])}}, 6, ()),
    "Straggler": (
        "Straggler", {"observed": {"timeline": lambda step: timeline(step, forward=[0.1, 0.3])}}, 6, ("rank 1",)),
    "PipelineBubble": (
        "PipelineBubble",
        {"observed": {"timeline": lambda step: timeline(step, pipeline=[0.2, 0.2])}}, 6, ()),
    "BatchSize": (
        "BatchSize:patience=40:window=10",
        {"observed": {"system": lambda step: [sample(gpus=[{"used": 40.0, "memory": 9.0}])] * 5}}, 16, ()),
    "CPUBottleneck": (
        "CPUBottleneck:patience=40:window=10",
        {"observed": {"system": lambda step: [sample(core=99.0, gpus=[{"used": 5.0, "memory": 9.0}])] * 5}}, 16, ()),
    "IOBottleneck": (
        "IOBottleneck:patience=40:window=10",
        {"observed": {"system": lambda step: [sample(io_wait=60.0, gpus=[{"used": 5.0, "memory": 9.0}])] * 5}},
        16, ()),
    "Dataloader": (
        "Dataloader", {"observed": {"system": lambda step: [sample(workers=9)] * 5}}, 4, ()),
    "GPUMemoryIncrease": (
        "GPUMemoryIncrease:patience=20",
        {"observed": {"system": lambda step: [sample(gpus=[{"used": 90.0, "memory": 30.0 + step}])] * 5}}, 16,
        ("GPU 0",)),
    "LoadBalancing": (
        "LoadBalancing:patience=40:window=10",
        {"observed": {"system": lambda step: [
            sample(gpus=[{"used": 95.0, "memory": 9.0}, {"used": 30.0, "memory": 9.0}])] * 5}},
        16, ("GPU 0", "GPU 1")),
    "LowGPUUtilization": (
        "LowGPUUtilization:patience=40:window=10",
        {"observed": {"system": lambda step: [sample(gpus=[{"used": 40.0, "memory": 9.0}])] * 5}}, 16, ("GPU 0",)),
    "LowGPUUtilization, swinging": (
        "LowGPUUtilization:patience=40:window=10",
        {"observed": {"system": lambda step: [
            sample(gpus=[{"used": used, "memory": 9.0}]) for used in (95.0, 95.0, 95.0, 0.0, 95.0)]}},
        16, ("GPU 0",)),
}  # fmt: skip

SUMMARIES = {"OverallSystemUsage", "OverallFrameworkMetrics"}
"""Never fire."""


def test_every_rule_has_a_fault_here() -> None:
    compared = {"SimilarAcrossRuns"}  # below, with another run
    assert {name.partition(",")[0] for name in FAULTS} == RULES.keys() - SUMMARIES - compared


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_fires_at_its_fault_and_only_there(name: str) -> None:
    word, fault, step, where = FAULTS[name]
    found = judged([word], history(**fault))
    assert found, "it is silent"
    assert (found[0].step, found[0].where) == (step, where)
    assert found[0].rule == word.partition(":")[0]
    assert found[0].why
    assert found[0].advice
    assert not judged([word], history())


def saved(folder: Path, seen: Iterable[Seen]) -> SavedRun:
    """The run on disk, as its recorder writes it."""
    recorder: Recorder | None = None
    metrics = []
    for each in seen:
        if recorder is None:
            guard = Guard(Environment(), strict=True)
            recorder = Recorder(folder / "debugger", guard, 0, list(healthy(0)), histograms=True)
        for kind, value in each.observed.items():
            recorder.observed(each.step, kind, value, evaluation=bool(each.scores))
        if each.scores:
            scores = {f"evaluation/{name}": value for name, value in each.scores.items()}
            metrics.append({"kind": "evaluation", "time": each.time, "step": each.step, **scores})
            continue
        recorder.scalars(each.step, [getattr(each, name) for name in SCALARS])
        if each.tensors is not None:
            recorder.statistics(each.step, each.tensors)
    assert recorder is not None
    recorder.close()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return open_run(str(folder))


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_finds_afterwards_what_it_found_live(name: str, tmp_path: Path) -> None:
    word, fault, _, _ = FAULTS[name]
    live = judged([word], history(**fault))
    assert [str(each) for each in saved(tmp_path, history(**fault)).judge([word])] == [str(each) for each in live]


def test_a_run_that_is_another_one_again_is_told(tmp_path: Path) -> None:
    saved(tmp_path / "other", history())
    word = f"SimilarAcrossRuns:other_trials={tmp_path / 'other'}"
    assert [each.step for each in judged([word], history())] == [2]
    assert not judged([word], history(scaled("one.weight", 1.1, 1)))
    with pytest.raises(UserError, match="needs other_trials"):
        build(["SimilarAcrossRuns"])


def test_summaries_find_nothing_and_sum_up() -> None:
    for name, part, mean in (("OverallSystemUsage", "cpu", 60.0), ("OverallFrameworkMetrics", "forward", 0.1)):
        rule = build([name])[0]
        assert not [each for seen in history() for each in Watch([rule], print).update(seen)]
        assert rule.report()[part]["mean"] == pytest.approx(mean)  # type: ignore[attr-defined]


def test_a_report_of_the_profiler_is_all_of_its_rules_with_their_parameters() -> None:
    rules = {type(rule).__name__: rule for rule in build(["ProfilerReport:StepOutlier_stddev=5"])}
    assert rules.keys() == set(PROFILER)
    assert rules["StepOutlier"].stddev == 5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="did you mean 'StepOutlier'"):
        build(["ProfilerReport:StepOutliers_stddev=5"])


def test_a_fault_that_lasts_is_told_once_and_again_when_it_comes_back() -> None:
    def twice(tensors: dict[str, torch.Tensor], step: int) -> None:
        if 6 <= step < 12 or step >= 30:
            tensors["gradient/one.weight"] = 0 * tensors["gradient/one.weight"]

    assert [each.step for each in judged(["AllZero"], history(twice))] == [6, 30]


def test_what_goes_wrong_later_is_told_by_itself() -> None:
    def one_after_another(tensors: dict[str, torch.Tensor], step: int) -> None:
        for since, name in ((6, "gradient/one.weight"), (20, "gradient/two.weight")):
            if step >= since:
                tensors[name] = 0 * tensors[name]

    found = judged(["AllZero"], history(one_after_another))
    assert [(each.step, each.where) for each in found] == [
        (6, ("gradient/one.weight",)),
        (20, ("gradient/two.weight",)),
    ]


@dataclass
class Broken(Rule):
    """Divides by zero at step 5."""

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.step == 5:
            yield self.finding(5, f"{1 / (seen.step - 5)}")


def test_a_rule_that_fails_is_switched_off_and_the_others_go_on() -> None:
    told: list[str] = []
    watch = Watch([Broken(), *build(["AllZero"])], told.append)
    found = [each for seen in history(scaled("gradient/two.weight", 0.0, 9)) for each in watch.update(seen)]
    assert told == ["rule Broken failed at step 5 and is switched off (ZeroDivisionError: division by zero)"]
    assert [each.step for each in found] == [10]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("VanishingGradients", "has no rule 'VanishingGradients'; did you mean 'VanishingGradient'"),
        ("AllZero:treshold=3", "rule AllZero has no parameter 'treshold'; did you mean 'threshold'"),
        ("AllZero:threshold=much", "parameter threshold of rule AllZero is 'much': input should be a valid number"),
        ("UnchangedTensor:_rows=3", "rule UnchangedTensor has no parameter '_rows'"),
    ],
)
def test_an_unknown_rule_or_parameter_is_told(word: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build([word])


def test_a_rule_named_again_takes_the_place_of_the_default() -> None:
    rules = {type(rule).__name__: rule for rule in build(["default", "VanishingGradient:threshold=0.5"])}
    assert rules["VanishingGradient"].threshold == 0.5  # type: ignore[attr-defined]
    assert len(rules) == len(build(["default"]))


def test_updates_without_their_weights_are_no_fault_of_a_rule() -> None:
    seen = Seen(
        2, loss=1.0, learning_rate=0.1, tensors=Tensors(Index(["update/w"]), moments_of([torch.ones(3)]).numpy())
    )
    assert not judged([name for name in RULES if name != "SimilarAcrossRuns"], [seen] * 4)


def test_nothing_is_found_of_empty_tensors() -> None:
    index = Index(["w", "gradient/w", "update/w"])
    rows = moments_of([torch.empty(0)] * 3).numpy()
    seen = Seen(2, loss=1.0, learning_rate=0.1, tensors=Tensors(index, rows))
    assert not judged([name for name in RULES if name != "SimilarAcrossRuns"], [seen] * 4)
    assert np.isneginf(rows[:, 6]).all()
