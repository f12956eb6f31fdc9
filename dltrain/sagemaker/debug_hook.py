"""SageMaker Debugger's configuration, ``debughookconfig.json``, as settings of our debugger.

What it says of collections becomes ``debugger.collect`` and ``debugger.collections``, and rules ``debugger.rules``
(:mod:`dltrain.sagemaker.debug_rules`). Three things differ: steps that are listed replace the interval, a collection
that is given twice is one (the smallest interval, all expressions), and names are without classes and wrappers.
Statistics take the place of tensors, which are kept themselves only with ``save_raw_tensor``. A file that asks for
nothing, as the SDK sends by default, changes nothing.

    config = apply_debug_hook(config, overrides, environment)

What cannot be carried over is told in one sentence each and left out, or refused with ``debugger.strict``.

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/debugger-createtrainingjob-api.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dltrain import storage
from dltrain.config import Config, Debugger
from dltrain.errors import UserError, nearest
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.sagemaker.debug_collections import Complaints, settings_of
from dltrain.sagemaker.folders import Folders

C = TypeVar("C", bound=Config)

FILE = "debughookconfig.json"
PATH = "SMDEBUG_CONFIG_FILE_PATH"
"""Variable that names another file, as smdebug has it."""

OFF = "off"

_WHEN = ("every", "start", "end", "steps")

_KEYS = ("S3OutputPath", "S3Path", "LocalPath", "HookParameters", "CollectionConfiguration", "CollectionConfigurations")
_OF_REQUESTS = ("DebugHookConfig", "DebugRuleConfigurations")
"""Keys of a CreateTrainingJob request, which may stand for the file."""


def apply_debug_hook(
    config: C, overrides: Iterable[str], environment: Environment, variables: Mapping[str, str] | None = None
) -> C:
    """The config with what the file says where neither ``overrides`` (names of settings) nor the config say anything.

    Raises :class:`UserError` where ``debugger.config`` names no file, and with ``debugger.strict`` for anything that
    cannot be carried over; without it that is told once, by rank 0.
    """
    if config.debugger.config:
        storage.configure(config.storage)
    found = find_file(config.debugger.config, os.environ if variables is None else variables)
    given = {name.replace("__", ".") for name in overrides}
    if found is None or ("debugger.every" in given and not config.debugger.on):
        return config
    told: Complaints = []
    said = read_file(found, told)
    for each in told:
        if config.debugger.strict:
            raise UserError(each)
        warn(environment, each)
    changes = {name: value for name, value in said.items() if name not in _given(config.debugger, given)}
    return config.replace(debugger=config.debugger.replace(**changes)) if changes else config


def find_file(setting: str, variables: Mapping[str, str]) -> str | None:
    """Where the configuration lies, or None. Raises :class:`UserError` where the setting names nothing."""
    if setting == OFF or (not setting and variables.get("USE_SMDEBUG", "").lower() in ("0", "false")):
        return None
    place = setting or variables.get(PATH) or str(Folders.read(variables).config / FILE)
    if storage.exists(place):
        return place
    if setting or variables.get(PATH):
        raise UserError(f"{'debugger.config' if setting else PATH} names {place!r}, and there is no such file")
    return None


def read_file(place: str, told: Complaints) -> dict[str, Any]:
    """Settings of ``debugger`` by name, and what could not be carried over."""
    try:
        tree = json.loads(storage.read(place))
    except ValueError as error:
        told.append(f"{place} is not JSON ({error}); the debugger goes on without it")
        return {}
    if isinstance(tree, list):
        tree = {"DebugRuleConfigurations": tree}
    if not isinstance(tree, dict):
        told.append(f"{place} is no mapping, as {FILE} is, nor a list of rules; the debugger goes on without it")
        return {}
    rules = tree.get("DebugRuleConfigurations") or []
    hook = tree.get("DebugHookConfig") or {} if "DebugHookConfig" in tree else tree
    if "DebugHookConfig" not in tree:  # of a whole request the rest is not ours
        _refuse_unknown(place, hook, told)
    words = _words(place, rules, told)
    said = settings_of(place, hook, told, with_rules=bool(words))
    return {**said, "rules": words} if words else said


def _words(place: str, rules: Any, told: Complaints) -> tuple[str, ...]:
    if not rules:
        return ()
    from dltrain.sagemaker.debug_rules import words_of  # which imports the rules

    return words_of(place, rules, told)


def _refuse_unknown(place: str, tree: Mapping[str, Any], told: Complaints) -> None:
    for key in tree:
        if key not in (*_KEYS, *_OF_REQUESTS):
            told.append(f"{place} has a key {key!r}, which is passed over; {nearest(key, _KEYS)}")


def _given(debugger: Debugger, overrides: set[str]) -> set[str]:
    """Settings on the command line, or of another value than the default; steps are given or not as a whole."""
    default = Debugger()
    names = [name for name in Debugger.model_fields if getattr(debugger, name) != getattr(default, name)]
    found = {*names, *(name.removeprefix("debugger.") for name in overrides if name.startswith("debugger."))}
    return found | {*_WHEN} if found & {*_WHEN} else found
