"""Hyperparameters of a training job as settings, whichever way they came.

SageMaker knows text alone, and what starts a script hands it on in ways of its own: as ``SM_HPS`` (JSON, reliable), and
as a command line that SDK v2 writes as ``--flag True --opts a=1,b=2 -n 5``, SDK v3 as ``--flag true``, and older
toolkits as what a shell makes of it. So ``SM_HPS`` counts, and of the command line only what is not in it.

    given = read_hyperparameters()
    given.settings  # {"optim.learning_rate": 0.1}
    given.arguments(sys.argv[1:])  # the command line without them

A setting is written ``optim__learning_rate``, for some launchers make a variable of the shell of each name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dltrain.config import Config
from dltrain.config.load import leaves
from dltrain.errors import UserError, nearest
from dltrain.sagemaker.folders import Folders, object_of
from dltrain.sagemaker.model_parallel import NAME as MODEL_PARALLEL
from dltrain.sagemaker.model_parallel import settings_of

FILE = "hyperparameters.json"

WORDS = ("recipe", "preset", "config", "nproc")
"""Of the command line, where they are no settings."""

OF_THE_SDK = "sagemaker_"
"""Begins the names of hyperparameters that SageMaker's SDKs add for themselves."""


@dataclass(frozen=True)
class Hyperparameters:
    """``settings`` by dotted name, values as JSON has them or as text; ``words`` are :data:`WORDS`; ``told`` is what a
    user should know about them, a sentence each."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    """As they were given."""
    told: tuple[str, ...] = ()

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """A command line without the options that are hyperparameters, and without what belongs to those."""
        kept, skipping = [], False
        for word in arguments:
            option = _option(word)
            if option is not None:
                skipping = option in self.names or _dotted(option) in self.settings or option.startswith(OF_THE_SDK)
            if not skipping:
                kept.append(word)
            elif "=" in word and word.startswith("--"):
                skipping = False
        return kept


def read_hyperparameters(variables: Mapping[str, str] | None = None, folders: Folders | None = None) -> Hyperparameters:
    """From ``SM_HPS``, or else ``hyperparameters.json``; none outside SageMaker.

    Raises :class:`UserError` for names that are no settings by their form, for one that is given twice, and for
    ``mp_parameters`` that have no counterpart.
    """
    said = os.environ if variables is None else variables
    if "SM_HPS" in said:
        given = object_of(said["SM_HPS"], "SM_HPS")
    else:
        given = (folders or Folders.read(said)).described(FILE)
    given = {name: _decoded(value) for name, value in given.items() if not name.startswith(OF_THE_SDK)}
    model_parallel = given.pop(MODEL_PARALLEL, None)
    settings: dict[str, Any] = {}
    words: dict[str, str] = {}
    for name, value in given.items():
        setting = _dotted(name)
        if value is None or value == "":
            continue  # of a value that is not there launchers make null and nothing
        if setting in WORDS:
            words[setting] = str(value)
        elif "." not in setting:
            raise UserError(
                f"hyperparameter {name!r} is no setting{_meant(name)}: settings have a section, as "
                f"optim__learning_rate has; beside them there are {', '.join(WORDS)} and mp_parameters"
            )
        elif setting in settings:
            raise UserError(f"hyperparameter {setting!r} is given twice, with dots and with __; give it once")
        else:
            settings[setting] = value
    told: tuple[str, ...] = ()
    if model_parallel is not None:
        mapped, told = settings_of(model_parallel)
        settings = {**mapped, **settings}
    return Hyperparameters(settings, words, frozenset((*given, MODEL_PARALLEL)), told)


def _meant(name: str) -> str:
    found = nearest(name, leaves(Config))
    return f" ({found})" if found.startswith("did") else ""


def _option(word: str) -> str | None:
    """The name of an option, None of what is none: ``--a=1`` and ``-n`` are, ``-1`` and ``-0.5`` are not."""
    if word.startswith("--") and len(word) > 2:
        return word[2:].partition("=")[0]
    return word[1:] if len(word) == 2 and word[0] == "-" and word[1].isalpha() else None


def _dotted(name: str) -> str:
    return name.replace("__", ".")


def _decoded(value: Any) -> Any:
    """SDK v2 writes every value as JSON, SDK v3 leaves text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
