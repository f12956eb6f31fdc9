"""What rules are shown of an imported trial: losses, scores of evaluations, and moments of tensors, as far as these can
be had from what was kept. A rule that needs more is refused by name; of the default ones it is left out.

Of a tensor of which numbers alone were kept, the moments that do not follow from them are not a number, and its sum is
0: rules of your own should ask ``run.tensor(name).reductions(...)`` there. Updates are differences of weights between
steps that were kept; shares of active units are those of the whole micro-batch.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dltrain.debugger.activations import SIGMOID, TANH
from dltrain.debugger.findings import Finding
from dltrain.debugger.moments import COLUMNS
from dltrain.debugger.needs import Needs
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules import activations, losses, tensors
from dltrain.debugger.rules.base import Rule, TensorRule, Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.seen import Index, Seen, Tensors
from dltrain.debugger.shares import LEAST
from dltrain.debugger.smdebug.events import Values
from dltrain.errors import UserError

if TYPE_CHECKING:
    from dltrain.debugger.smdebug.run import ImportedRun, ImportedTensor

_UNITS: dict[str, tuple[str, Callable[[Values], Values]]] = {
    r"(^|[._])relu\d*_output_0$": ("active", lambda values: values > 0),
    r"(^|[._])tanh\d*_input_0$": ("unsaturated", lambda values: (values >= TANH[0]) & (values <= TANH[1])),
    r"(^|[._])sigmoid\d*_input_0$": ("unsaturated", lambda values: (values >= SIGMOID[0]) & (values <= SIGMOID[1])),
}
"""Tensors, as SageMaker Debugger's rules know them, whose elements do something or nothing."""

_OF_KIND: dict[type[Rule], str] = {
    tensors.VanishingGradient: "gradients",
    tensors.WeightUpdateRatio: "updates",
    tensors.UnevenUpdates: "updates",
    tensors.UnchangedTensor: "weights",
}
"""What rules look at that do not say it themselves."""

LEARNING_RATE = math.nan
"""It is not known, and it is not 0."""


def judge(run: ImportedRun, rules: Iterable[str], worker: str = "") -> Iterator[Finding]:
    """Findings in the order of the steps. Raises :class:`UserError` for a rule that needs what there is not."""
    words = list(rules)
    by_name = {type(rule).__name__ for rule in build([word for word in words if word != "default"])}
    can: list[Rule] = []
    for rule in build(words):
        lacks = _lacks(run, rule, worker)
        if not lacks:
            can.append(rule)
        elif type(rule).__name__ in by_name:
            raise UserError(f"rule {type(rule).__name__} needs {lacks}, which this trial did not keep; leave it out")
    told: list[str] = []
    watches = [(rule, Watch([rule], told.append)) for rule in can]
    for seen in history(run, worker):
        for rule, watch in watches:
            if _concerns(rule, seen):
                yield from watch.update(seen)
        if told:
            raise UserError(told[0])


def _concerns(rule: Rule, seen: Seen) -> bool:
    """Whether there is something for a rule: a step without its tensors does not say that all is well again."""
    if seen.tensors is None:
        return not isinstance(rule, TensorRule)
    if not isinstance(rule, TensorRule):
        return False
    kind = getattr(rule, "kind", _OF_KIND.get(type(rule), ""))
    kinds = getattr(rule, "collection_names", (kind,) if kind else seen.tensors.index.kinds)
    return any(seen.tensors.reduced(each, "max")[0] for each in kinds)


def history(run: ImportedRun, worker: str = "") -> Iterator[Seen]:
    """Steps with a loss, steps with tensors, and evaluations, each by itself, in the order of the steps."""
    return heapq.merge(_losses(run, worker), _tensors(run, worker), key=lambda seen: seen.step)


def _lacks(run: ImportedRun, rule: Rule, worker: str) -> str:
    """What a rule needs and the trial has not; empty where it has all."""
    if rule.needs() != Needs() or not {"step", "tensors"} & set(rule.when):
        return "observations of dltrain's own"
    if isinstance(rule, losses.LossScaleCollapse):
        return "the loss scale"
    if not isinstance(rule, TensorRule):
        evaluations = isinstance(rule, losses.Overfit | losses.Overtraining) and "eval" not in run.modes()
        return "losses of evaluations" if evaluations else "" if run.tensor_names(kind="losses") else "losses"
    if isinstance(rule, tensors.VanishingGradient):
        return _needed(run, "gradients", "abs_mean", worker)
    if isinstance(rule, tensors.WeightUpdateRatio | tensors.UnevenUpdates | tensors.UnchangedTensor):
        return _needed(run, "weights", "", worker)
    if isinstance(rule, tensors.TensorVariance):
        return next((need for kind in rule.collection_names if (need := _needed(run, kind, "variance", worker))), "")
    if isinstance(rule, tensors.AllZero):
        wanted = "abs_max" if rule.threshold >= 100 else ""
        return next((need for kind in rule.collection_names if (need := _needed(run, kind, wanted, worker))), "")
    if isinstance(rule, activations.DeadRelu | activations.SaturatedActivation):
        there = [name for name in run.tensor_names() if _units_of(name)[0] == rule.kind]
        return "" if any(run.tensor(name, worker).values() for name in there) else f"values of {_BY_KIND[rule.kind]}"
    return ""


_SIZES = ("abs_max", "abs_mean", "abs_sum", "l1", "l2")
"""Reductions that are 0 where all values are."""

_BY_KIND = {"active": "ReLUs' outputs (relu_output)", "unsaturated": "inputs of tanh or sigmoid (tanh_input)"}


def _needed(run: ImportedRun, kind: str, reduction: str, worker: str) -> str:
    """``reduction`` (or values, where it is empty) of every tensor of a kind; what of it there is not."""
    found = [run.tensor(name, worker) for name in run.tensor_names(kind=kind)]
    if any(each.steps and _has(each, reduction) for each in found):
        return ""
    return f"{reduction} of {kind}" if reduction else f"values of {kind}"


def _has(tensor: ImportedTensor, reduction: str) -> bool:
    if reduction == "abs_max" and (any(map(tensor.can, _SIZES)) or (tensor.can("min") and tensor.can("max"))):
        return True
    return tensor.can(reduction) if reduction else bool(tensor.values())


def _losses(run: ImportedRun, worker: str) -> Iterator[Seen]:
    """Of training one by one; of an evaluation, which has a step for each batch, their mean, at the step before it."""
    names = run.tensor_names(kind="losses")
    if not names:
        return
    tensor = run.tensor(names[0], worker)
    written, before = tensor.written(), -1
    for evaluation, some in groupby(written, key=lambda step: run.at(step).mode in ("eval", "predict")):
        steps = list(some)
        if evaluation:
            mean = float(np.mean([written[step][1].mean() for step in steps]))
            yield Seen(max(before, 0), written[steps[-1]][0], scores={"loss": mean})
            continue
        for step in steps:
            when, values = written[step]
            yield Seen(step, when, float(values.mean()), learning_rate=LEARNING_RATE)
        before = steps[-1]


def _tensors(run: ImportedRun, worker: str) -> Iterator[Seen]:
    """Moments of weights, gradients, updates and activations at every training step that has some."""
    found = {name: run.tensor(name, worker) for name in run.tensor_names() if run.kind_of(name) not in _NO_TENSORS}
    rows: dict[int, dict[str, Array]] = {}
    for tensor in found.values():
        for step, name, row in _rows(run, tensor):
            rows.setdefault(step, {})[name] = row
    index = Index(list(dict.fromkeys(name for of_step in rows.values() for name in of_step)))
    nothing = np.zeros(len(COLUMNS))
    for step in sorted(rows):
        table = np.stack([rows[step].get(name, nothing) for name in index.names])
        yield Seen(step, learning_rate=LEARNING_RATE, tensors=Tensors(index, table))


_NO_TENSORS = ("losses", "scalar")


def _rows(run: ImportedRun, tensor: ImportedTensor) -> Iterator[tuple[int, str, Array]]:
    from dltrain.debugger.smdebug.run import moments

    values, numbers, before = tensor.values(), tensor.numbers(), None
    kind, working = _units_of(tensor.name)
    for step in (each for each in tensor.steps if run.at(each).mode in ("train", "global")):
        if step not in values:
            yield step, tensor.name, _row_of_numbers(numbers[step])
            continue
        now = values[step]
        yield step, tensor.name, moments(now)
        if kind and working is not None and now.ndim > 1:
            yield step, f"{kind}/{tensor.name.rpartition('_')[0].rpartition('_')[0]}", moments(_shares(working(now)))
        if run.kind_of(tensor.name) == "weights" and before is not None and before.shape == now.shape:
            yield step, f"update/{tensor.name}", moments(now - before)
        before = now


def _units_of(name: str) -> tuple[str, Callable[[Values], Values] | None]:
    return next((units for expression, units in _UNITS.items() if re.search(expression, name)), ("", None))


def _shares(working: Values) -> Values:
    """Of each unit, a channel of images or a feature of tokens: the share of its elements, 0 below :data:`LEAST`."""
    axis = 1 if working.ndim >= 4 else working.ndim - 1
    shares: Values = working.mean(tuple(each for each in range(working.ndim) if each != axis))
    return np.where(shares < LEAST, 0.0, shares)


def _row_of_numbers(kept: dict[str, float]) -> Array:
    """Moments, as of one element, from reductions: not a number where they do not say."""
    mean = kept.get("mean", math.nan)
    variance = kept.get("variance", kept["std"] ** 2 if "std" in kept else math.nan)
    sizes = [abs(kept[name]) for name in ("abs_max", "min", "max") if name in kept]
    known = {
        "count": 1.0,
        "sum": _sum(kept),
        "squares": variance + (mean**2 if math.isfinite(mean) else 0.0),
        "absolute": kept.get("abs_mean", math.nan),
        "zeros": 1.0 if _is_nothing(kept) else math.nan,
        "nonfinite": float(not all(map(math.isfinite, kept.values()))),
        "largest": kept.get("max", max(sizes, default=math.nan)),
        "least_negated": -kept.get("min", math.nan),
        "least_absolute_negated": -kept.get("abs_min", math.nan),
    }
    return np.array([known[column] for column in COLUMNS])


def _sum(kept: dict[str, float]) -> float:
    """Not a number where a value is none, and only there: that is what it is asked for."""
    return math.nan if any(map(math.isnan, kept.values())) else kept.get("mean", 0.0)


def _is_nothing(kept: dict[str, float]) -> bool:
    return any(kept.get(name) == 0 for name in _SIZES) or kept.get("min") == kept.get("max") == 0
