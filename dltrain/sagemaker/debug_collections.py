"""HookParameters and CollectionConfigurations of SageMaker Debugger: which tensors, on which steps, in which form.

    settings_of(place, tree, told=[])  # {"every": 500st, "collect": ("gradients",), ...}

Its steps count from 0 and ours from 1, so listed steps, ``start_step`` and ``end_step`` are one more here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dltrain.config import Collection, Length
from dltrain.debugger.smdebug.names import expression
from dltrain.errors import nearest

Complaints = list[str]
"""Sentences about what is left out."""

INTERVAL = 500
"""Steps, where none are given: SageMaker Debugger's default, and that of its rules' collections."""

KINDS = {
    "weights": ("weights",),
    "biases": ("biases",),
    "gradients": ("gradients",),
    "relu_output": ("activations",),
    "optimizer_variables": ("optimizer_state",),
    "all": ("all",),
    "losses": (),
    "metrics": (),
    "scalars": (),
    "sm_metrics": (),
}
"""By collection what it is to us; losses and metrics of every step are kept anyway."""

_BY_NAME = {"relu_input": r"relu\d*_input_", "tanh_input": r"tanh\d*_input_", "sigmoid_input": r"sigmoid\d*_input_"}
"""Collections of the rules' own, and what they hold unless they say so themselves."""

_ACTIVATIONS = re.compile(r"^\^?(\.\*)?relu_output(_0)?\$?$")
"""An expression that means what ReLUs return, whatever they are called."""

_MODES = ("train", "eval", "predict", "global")
_WHEN = ("save_interval", "save_steps", "start_step", "end_step")
_FORM = ("include_regex", "reductions", "save_raw_tensor", "save_shape", "save_histogram")
_OF_HOOK = ("dry_run", "save_all", "include_workers", "export_tensorboard", "tensorboard_dir")
_REDUCTIONS = ("min", "max", "mean", "std", "variance", "sum")
_KEPT = {prefix + name for name in (*_REDUCTIONS, "l1_norm", "l2_norm") for prefix in ("", "abs_")}
"""Reductions that statistics hold, as they are written there."""


@dataclass(frozen=True)
class _Asked:
    """What is asked of a collection; ``every`` 0 is not said."""

    expressions: tuple[str, ...] = ()
    every: int = 0
    start: int = 0
    end: int = 0
    steps: tuple[int, ...] = ()
    raw: bool = False
    histograms: bool = False
    evaluation: bool = False

    def merged(self, other: _Asked) -> _Asked:
        """Of a collection that is given twice."""
        return _Asked(
            tuple(dict.fromkeys((*self.expressions, *other.expressions))),
            min(self.every, other.every),
            min(self.start, other.start),
            max(self.end, other.end) if self.end and other.end else 0,
            tuple(sorted({*self.steps, *other.steps})),
            self.raw or other.raw,
            self.histograms or other.histograms,
            self.evaluation or other.evaluation,
        )

    @property
    def when(self) -> dict[str, Any]:
        return {"every": Length.parse(f"{self.every}st"), "start": self.start, "end": self.end, "steps": self.steps}

    @property
    def form(self) -> dict[str, Any]:
        return {"raw": self.raw, "histograms": self.histograms}


def settings_of(place: str, tree: Mapping[str, Any], told: Complaints, with_rules: bool = False) -> dict[str, Any]:
    """Settings of ``debugger`` by name; none where nothing is asked for, unless there are rules."""
    hook = _Parameters(place, "HookParameters", tree.get("HookParameters"), told)
    hook.check((*_WHEN, *_FORM, *_OF_HOOK))
    base = hook.asked(_Asked())
    asked: dict[str, _Asked] = {}
    if hook.flag("save_all"):
        asked["all"] = replace(base, expressions=())
    if base.expressions:
        asked["default"] = base
    key = "CollectionConfigurations" if "CollectionConfigurations" in tree else "CollectionConfiguration"
    for name, parameters in _collections(place, key, tree.get(key), told):
        parameters.check((*_WHEN, *_FORM))
        mine = parameters.asked(replace(base, expressions=()))
        if not parameters.names_nothing:
            asked[name] = asked[name].merged(mine) if name in asked else mine
    return _settings(place, asked, base, with_rules, told)


def _settings(place: str, asked: dict[str, _Asked], base: _Asked, with_rules: bool, told: Complaints) -> dict[str, Any]:
    named: dict[str, Collection] = {}
    kinds: dict[str, _Asked] = {}
    for name, each in asked.items():
        plain = name in KINDS and not each.expressions
        if plain or (each.expressions and all(_ACTIVATIONS.search(one) for one in each.expressions)):
            for kind in KINDS[name] if plain else ("activations",):
                kinds[kind] = kinds[kind].merged(each) if kind in kinds else each
        elif each.expressions or name in _BY_NAME:
            include = tuple(map(expression, each.expressions)) or (_BY_NAME[name],)
            named[name] = Collection(include=include, **each.when, **each.form)
        else:
            told.append(
                f"{place} names a collection {name!r} without include_regex, and it is left out; "
                f"{nearest(name, [*KINDS, *_BY_NAME])}"
            )
    if not kinds and not named:
        return next(iter(asked.values()), base).when if with_rules else {}
    found: dict[str, Any] = {"collections": named} if named else {}
    if kinds:
        found.update(_of_kinds(kinds, named))
    if any(each.evaluation for each in asked.values()):
        found["evaluation"] = True
    return found


def _of_kinds(kinds: dict[str, _Asked], named: dict[str, Collection]) -> dict[str, Any]:
    """Kinds have the steps that most of them have; the others are collections of their own beside those named."""
    common = Counter((each.every, each.start, each.end, each.steps) for each in kinds.values()).most_common(1)[0][0]
    own = {}
    for kind, each in kinds.items():
        if (each.every, each.start, each.end, each.steps) != common or each.raw or each.histograms:
            own[kind] = Collection(**each.when, **each.form)
    every, start, end, steps = common
    when = _Asked(every=every, start=start, end=end, steps=steps).when
    both = {**named, **own}
    return {**when, "collect": tuple(kinds), **({"collections": both} if both else {})}


class _Parameters:
    """Values of one mapping; what is wrong with them is told, and then as if it were not there."""

    def __init__(self, place: str, owner: str, values: Any, told: Complaints) -> None:
        self._place, self._owner, self._told = place, owner, told
        if values is not None and not isinstance(values, dict):
            told.append(f"{place} has no mapping in {owner}, but {_shown(values)}; it is left out")
        self._values: dict[str, Any] = values if isinstance(values, dict) else {}
        self.names_nothing = False
        """Whether its expressions are none."""

    def check(self, known: tuple[str, ...]) -> None:
        """Tell of keys that there are not, and of reductions that are not kept."""
        every = [*known, *(f"{mode}.{name}" for mode in _MODES for name in _WHEN)]
        for key in self._values:
            if key not in every:
                self._say(key, f"which is passed over; {nearest(key, every)}")
        for name in self._words("reductions"):
            if name and name not in _KEPT:
                self._say("reductions", f"where {name!r} is left out; {nearest(name, _KEPT)}")

    def asked(self, base: _Asked) -> _Asked:
        """What these say, over ``base``; of training, for which ``train.`` comes before ``global.`` and neither."""
        steps = self._steps()
        every = self._number("save_interval", 1)
        start, end = self._number("start_step", 0), self._number("end_step", 0)
        return replace(
            base,
            expressions=self._expressions() or base.expressions,
            every=every if every is not None else base.every or INTERVAL,
            start=_from_one(start, base.start),
            end=_from_one(end, base.end),
            steps=steps if steps else () if every is not None else base.steps,
            raw=self.flag("save_raw_tensor", base.raw),
            histograms=self.flag("save_histogram", base.histograms),
            evaluation=base.evaluation or any(key.startswith(("eval.", "predict.")) for key in self._values),
        )

    def flag(self, key: str, default: bool = False) -> bool:
        value = str(self._values.get(key, default)).strip().lower()
        if value not in ("true", "false"):
            self._say(key, "which is neither true nor false; it is left out")
        return value == "true" if value in ("true", "false") else default

    def _key(self, name: str) -> str:
        """The one that counts in training."""
        return next((key for key in (f"train.{name}", name, f"global.{name}") if key in self._values), name)

    def _number(self, name: str, least: int) -> int | None:
        key = self._key(name)
        value = self._values.get(key)
        if value is None:
            return None
        number = _whole(value)
        if number is None or number < least:
            self._say(key, f"which is no whole number of at least {least}; it is left out")
            return None
        return number

    def _steps(self) -> tuple[int, ...]:
        key = self._key("save_steps")
        found = [_whole(word) for word in self._words(key)]
        if any(each is None or each < 0 for each in found):
            self._say(key, "where steps are whole numbers with commas between; it is left out")
            return ()
        return tuple(sorted({each + 1 for each in found if each is not None}))

    def _expressions(self) -> tuple[str, ...]:
        found = [word for word in self._words("include_regex") if word]
        try:
            for each in found:
                re.compile(each)
        except re.error as error:
            self._say("include_regex", f"which is no regular expression ({error}); it is left out")
            self.names_nothing = True
            return ()
        return tuple(found)

    def _words(self, key: str) -> list[str]:
        value = self._values.get(key)
        if value is None or value == "":
            return []
        if isinstance(value, list):
            return [str(each).strip() for each in value]
        return [word.strip() for word in str(value).split(",")]

    def _say(self, key: str, what: str) -> None:
        value = f" ({self._values[key]!r})" if key in self._values else ""
        self._told.append(f"{self._place} has {key!r}{value} in {self._owner}, {what}")


def _collections(place: str, key: str, given: Any, told: Complaints) -> list[tuple[str, _Parameters]]:
    if given is None:
        return []
    if not isinstance(given, list):
        told.append(f"{place} has no list in {key}, but {_shown(given)}; it is left out")
        return []
    found = []
    for each in given:
        if not isinstance(each, dict) or not isinstance(each.get("CollectionName"), str):
            told.append(f"{place} has {_shown(each)} in {key}, which names no CollectionName; it is left out")
            continue
        name = each["CollectionName"]
        owner = f"CollectionParameters of {name!r}"
        found.append((name, _Parameters(place, owner, each.get("CollectionParameters"), told)))
    return found


def _from_one(step: int | None, default: int) -> int:
    """A step counted from 0, counted from 1; 0 is none, or the first."""
    return default if step is None else step + 1 if step else 0


def _whole(value: Any) -> int | None:
    text = str(value).strip()
    return int(text) if re.fullmatch(r"\d+", text) else None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
