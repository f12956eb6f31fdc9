"""The rules by name, and making them of words: ``VanishingGradient`` or ``Overfit:patience=3:ratio_threshold=0.5``.

build(["default", "LossNotDecreasing:num_steps=100"])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dltrain.debugger.actions import named
from dltrain.debugger.rules import activations, comparing, data, losses, machine, tensors, timing
from dltrain.debugger.rules.base import Rule
from dltrain.errors import UserError, nearest

RULES: dict[str, type[Rule]] = {
    name: value
    for module in (tensors, activations, losses, comparing, data, timing, machine)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__ and name[0] != "_"
}
"""By SageMaker Debugger's names, where it has them."""

DEFAULT = (
    "VanishingGradient",
    "ExplodingTensor",
    "WeightUpdateRatio",
    "UnevenUpdates",
    "AllZero",
    "DeadRelu",
    "SaturatedActivation",
    "UnchangedTensor",
    "LossSpike",
    "Overfit:ratio_threshold=1:patience=3:least=0.05",
    "StalledTrainingRule",
    "LossScaleCollapse",
    "DataWait",
    "Straggler",
    "PipelineBubble",
    "MaxInitializationTime",
)
"""Those that are silent in a healthy training; AWS's defaults, but for Overfit, which would fire in most."""


PROFILER = (
    "BatchSize",
    "CPUBottleneck",
    "IOBottleneck",
    "Dataloader",
    "GPUMemoryIncrease",
    "LoadBalancing",
    "LowGPUUtilization",
    "MaxInitializationTime",
    "StepOutlier",
    "OverallSystemUsage",
    "OverallFrameworkMetrics",
)
"""What ``ProfilerReport`` stands for; its parameters are theirs, as in ``ProfilerReport:StepOutlier_stddev=5``."""


def build(words: Iterable[str | Rule]) -> list[Rule]:
    """Rules of words; a rule named again takes the place of the one before, and ``default`` and ``ProfilerReport``
    stand for several. Rules that are given as such stay what they are.

    Raises :class:`UserError` for an unknown rule or parameter, and for a value of another type.
    """
    found: dict[str, Rule] = {}
    for word in words:
        for each in (word,) if isinstance(word, Rule) else _several(word):
            rule = each if isinstance(each, Rule) else _made(each)
            found[type(rule).__name__] = rule
    return list(found.values())


def names_of(words: Iterable[str]) -> list[str]:
    """Names of the rules that words stand for, known or not, each once."""
    return list(dict.fromkeys(each.partition(":")[0].rpartition(".")[2] for word in words for each in _several(word)))


def _several(word: str) -> Iterator[str]:
    name, *pairs = word.split(":")
    if word == "default":
        yield from DEFAULT
    elif name == "ProfilerReport":
        wrong = [pair for pair in pairs if pair.partition("_")[0] not in PROFILER]
        if wrong:
            raise UserError(
                f"ProfilerReport has no rule of {wrong[0]!r}; {nearest(wrong[0].partition('_')[0], PROFILER)}"
            )
        for each in PROFILER:
            own = [pair.partition("_")[2] for pair in pairs if pair.partition("_")[0] == each]
            yield ":".join((each, *own))
    else:
        yield word


def _made(word: str) -> Rule:
    kind, pairs = _kind_of(word)
    name, hints = kind.__name__, get_type_hints(kind)
    known = {each.name: hints[each.name] for each in fields(kind) if not each.name.startswith("_")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    actions: list[str] = []
    for parameter, given, text in pairs:
        if parameter == "action" and given:
            actions += text.split("+")
            continue
        if parameter not in known or not given:
            raise UserError(f"rule {name} has no parameter {parameter!r}; {nearest(parameter, [*known, 'action'])}")
        values[parameter] = _read(name, parameter, text, known[parameter])
    rule = kind(**values)
    if actions:
        rule.actions = tuple(actions)  # type: ignore[misc]
    return rule


def _kind_of(word: str) -> tuple[type[Rule], list[tuple[str, str, str]]]:
    """The class of a word, and its parameters; values may have colons in them, such as URLs."""
    name, *pairs = re.split(r":(?=\w+=)", word)
    if name in RULES:
        kind = RULES[name]
    elif "." in name:
        kind = named(name, "debugger.rules")
        if not (isinstance(kind, type) and issubclass(kind, Rule) and is_dataclass(kind)):
            raise UserError(f"debugger.rules names {name}, which is no @dataclass derived from Rule")
    else:
        raise UserError(f"debugger.rules has no rule {name!r}; {nearest(name, [*RULES, 'default', 'ProfilerReport'])}")
    return kind, [pair.partition("=") for pair in pairs]


def _read(rule: str, parameter: str, text: str, kind: Any) -> Any:
    given: Any = tuple(text.split("+")) if "tuple" in str(kind) else text
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise UserError(f"parameter {parameter} of rule {rule} is {text!r}: {said[:1].lower()}{said[1:]}") from None
