"""The rules by name, and making them of words: ``VanishingGradient`` or ``Overfit:patience=3:ratio_threshold=0.5``.

build(["default", "LossNotDecreasing:num_steps=100"])
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from dltrain.debugger.rules import activations, losses, tensors
from dltrain.debugger.rules.base import Rule
from dltrain.errors import UserError, nearest

RULES: dict[str, type[Rule]] = {
    name: value
    for module in (tensors, activations, losses)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__ and name[0] != "_"
}
"""By SageMaker Debugger's names, where it has them."""

DEFAULT = (
    "VanishingGradient",
    "ExplodingTensor",
    "WeightUpdateRatio",
    "AllZero",
    "DeadRelu",
    "SaturatedActivation",
    "UnchangedTensor",
    "LossSpike",
    "Overfit:ratio_threshold=1:patience=3",
    "StalledTrainingRule",
    "LossScaleCollapse",
)
"""Those that are silent in a healthy training; AWS's defaults, but for Overfit, which would fire in most."""


def build(words: Iterable[str]) -> list[Rule]:
    """Rules of words; a rule named again takes the place of the one before, and ``default`` stands for several.

    Raises :class:`UserError` for an unknown rule or parameter, and for a value of another type.
    """
    found: dict[str, Rule] = {}
    for word in words:
        for each in DEFAULT if word == "default" else (word,):
            rule = _made(each)
            found[type(rule).__name__] = rule
    return list(found.values())


def _made(word: str) -> Rule:
    name, *pairs = word.split(":")
    if name not in RULES:
        raise UserError(f"debugger.rules has no rule {name!r}; {nearest(name, [*RULES, 'default'])}")
    kind = RULES[name]
    hints = get_type_hints(kind)
    known = {each.name: hints[each.name] for each in fields(kind) if not each.name.startswith("_")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for pair in pairs:
        parameter, given, text = pair.partition("=")
        if parameter not in known or not given:
            raise UserError(f"rule {name} has no parameter {parameter!r}; {nearest(parameter, known)}")
        values[parameter] = _read(name, parameter, text, known[parameter])
    return kind(**values)


def _read(rule: str, parameter: str, text: str, kind: Any) -> Any:
    given: Any = tuple(text.split("+")) if "tuple" in str(kind) else text
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise UserError(f"parameter {parameter} of rule {rule} is {text!r}: {said[:1].lower()}{said[1:]}") from None
