"""Rules as SageMaker's requests have them (``DebugRuleConfigurations``), in the words of ``debugger.rules``.

words_of("rules.json", [{"RuleParameters": {"rule_to_invoke": "VanishingGradient", "threshold": "1e-6"}}], told=[])
# ("VanishingGradient:threshold=1e-6",)
"""

from __future__ import annotations

import json
from typing import Any

from dltrain.debugger.rules.catalogue import RULES, build
from dltrain.errors import UserError, nearest

_ACTION = "action_json"
_STOP = "stoptraining"


def words_of(place: str, rules: Any, told: list[str]) -> tuple[str, ...]:
    """One word for each rule that there is here; what is left out is told."""
    if not isinstance(rules, list):
        told.append(f"{place} has no list in DebugRuleConfigurations; its rules are left out")
        return ()
    return tuple(word for rule in rules if (word := _word(place, rule, told)))


def _word(place: str, rule: Any, told: list[str]) -> str:
    parameters = rule.get("RuleParameters") if isinstance(rule, dict) else None
    if not isinstance(parameters, dict) or not isinstance(parameters.get("rule_to_invoke"), str):
        told.append(f"{place} has a rule without RuleParameters that name a rule_to_invoke; it is left out")
        return ""
    name = parameters["rule_to_invoke"]
    if name not in RULES:
        told.append(f"{place} names a rule {name!r}, which is left out; {nearest(name, RULES)}")
        return ""
    word = name
    for parameter, value in parameters.items():
        if parameter not in ("rule_to_invoke", _ACTION):
            word = _with(place, word, parameter, _text(value), told)
    return _with_action(place, word, parameters.get(_ACTION), told)


def _with(place: str, word: str, parameter: str, value: str, told: list[str]) -> str:
    """The word with a parameter more, if the rule takes it."""
    longer = f"{word}:{parameter}={value}"
    try:
        build([longer])
    except UserError as error:
        told.append(f"{place}: {error}; it is left out")
        return word
    return longer


def _with_action(place: str, word: str, given: Any, told: list[str]) -> str:
    """Actions are one mapping or several; messages are sent by topics of SNS, which only the user can name."""
    try:
        actions = json.loads(given) if isinstance(given, str) and given else given or []
    except ValueError:
        actions = [{"name": given}]
    rule = word.partition(":")[0]
    for action in actions if isinstance(actions, list) else [actions]:
        name = action.get("name") if isinstance(action, dict) else action
        if name == _STOP:
            word = _with(place, word, "action", "stop", told)
        else:
            told.append(f"{place} gives {rule} an action {name!r}, which is left out; set debugger.actions sns:arn:...")
    return word


def _text(value: Any) -> str:
    """Lists have commas there, and a plus here."""
    return str(value).strip().replace(", ", ",").replace(",", "+")
