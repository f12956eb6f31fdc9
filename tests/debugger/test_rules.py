"""Every rule fires where its fault is, at the step where it is, and is silent where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dltrain.debugger.findings import Finding
from dltrain.debugger.moments import moments_of
from dltrain.debugger.rules.base import Rule, Watch
from dltrain.debugger.rules.catalogue import RULES, build
from dltrain.debugger.sampler import name_of
from dltrain.debugger.seen import Index, Seen, Tensors
from dltrain.errors import UserError

Change = Callable[[dict[str, torch.Tensor], int], Any]
STEPS = 40


def healthy(step: int) -> dict[str, torch.Tensor]:
    """Tensors of a model of two layers that learns."""
    generator = torch.Generator().manual_seed(step)
    found = {"active/relu": torch.full((20,), 0.5), "unsaturated/tanh": torch.ones(20)}
    for layer in ("one.weight", "two.weight"):
        weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * (0.1 + 0.001 * step)
        found[layer] = weight
        found[name_of("gradients", layer)] = 0.01 * torch.randn(20, 30, generator=generator)
        found[name_of("updates", layer)] = 1e-4 * torch.randn(20, 30, generator=generator)
    return found


def history(change: Change | None = None, losses: Callable[[int], float] | None = None, **more: Any) -> Iterable[Seen]:
    """Forty steps, tensors on every second one, an evaluation after every tenth."""
    for step in range(1, STEPS + 1):
        tensors = healthy(step)
        if change is not None:
            change(tensors, step)
        index = Index(list(tensors))
        rows = moments_of(list(tensors.values())).numpy()
        loss = 3 * 0.95**step if losses is None else losses(step)
        scalars = {"time": 1000.0 + step, "norm": 1.0, "learning_rate": 0.1}
        scalars |= {name: value(step) for name, value in more.items() if name != "held_out"}
        yield Seen(step, loss=loss, tensors=Tensors(index, rows) if step % 2 == 0 else None, **scalars)
        if step % 10 == 0:
            held_out = more.get("held_out", lambda step: 3 * 0.95**step)
            yield Seen(step, time=1000.0 + step, scores={"loss": held_out(step), "accuracy": 0.5})


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
}  # fmt: skip


def test_every_rule_has_a_fault_here() -> None:
    assert {name.partition(",")[0] for name in FAULTS} == RULES.keys()


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
    assert not judged(list(RULES), [seen] * 4)


def test_nothing_is_found_of_empty_tensors() -> None:
    index = Index(["w", "gradient/w", "update/w"])
    rows = moments_of([torch.empty(0)] * 3).numpy()
    seen = Seen(2, loss=1.0, learning_rate=0.1, tensors=Tensors(index, rows))
    assert not judged(list(RULES), [seen] * 4)
    assert np.isneginf(rows[:, 6]).all()
