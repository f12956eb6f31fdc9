"""SageMaker's profiler configuration, ``profilerconfig.json``, as settings of our profiler.

    config = apply_profiler(config, overrides, environment)

``DetailedProfilingConfig`` becomes ``profiler.trace``, the interval of system metrics ``profiler.system``; what has no
counterpart is told in one sentence each. Its steps count from 0 and ours from 1. A file that asks for nothing, as the
SDK sends by default, changes nothing.

Reference: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_ProfilerConfig.html
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dltrain.config import Config, Profiler
from dltrain.errors import UserError, nearest
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.sagemaker.folders import Folders, object_of

C = TypeVar("C", bound=Config)

FILE = "profilerconfig.json"
PATH = "SMPROFILER_CONFIG_PATH"
"""Variable that names another file, as smdebug has it."""

TRACED, FIRST_TRACED = "DetailedProfilingConfig", 5
"""What asks for traces, and the first step where it does not say."""

_SETTLED = ("LocalPath", "RotateMaxFileSizeInBytes", "RotateFileCloseIntervalInSeconds", "FileOpenFailThreshold")
"""Of smdebug's files, which there are none of."""

_OTHERWISE = {
    "DataloaderProfilingConfig": "every logged line tells how long steps waited for data",
    "PythonProfilingConfig": "profiler.trace shows what Python calls",
    "HorovodProfilingConfig": "profiler.trace shows collectives",
    "SMDataParallelProfilingConfig": "profiler.trace shows collectives",
}


def apply_profiler(
    config: C, overrides: Iterable[str], environment: Environment, variables: Mapping[str, str] | None = None
) -> C:
    """The config with what the file says where neither ``overrides`` (names of settings) nor the config say anything.

    Raises :class:`UserError` for a file that cannot be read as what it is.
    """
    said = os.environ if variables is None else variables
    file = Path(said.get(PATH) or Folders.read(said).config / FILE)
    if not file.is_file():
        return config
    found, told = read_profiler(object_of(file.read_text(), str(file)))
    for each in told:
        warn(environment, f"{FILE}: {each}")
    usual, given = Profiler(), {name.replace("__", ".") for name in overrides}
    changes = {
        name: value
        for name, value in found.items()
        if f"profiler.{name}" not in given and getattr(config.profiler, name) == getattr(usual, name)
    }
    return config.replace(profiler=config.profiler.replace(**changes)) if changes else config


def read_profiler(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of ``profiler`` by name, and sentences about what is left out. Raises :class:`UserError`."""
    parameters = tree.get("ProfilingParameters") or {}
    if tree.get("DisableProfiler") or not parameters:
        return {}, []
    found: dict[str, Any] = {}
    if interval := tree.get("ProfilingIntervalInMilliseconds"):
        found["system"] = _number(interval, "ProfilingIntervalInMilliseconds") / 1000
    told = [f"{name} is left out: {why}" for name, why in _OTHERWISE.items() if name in parameters]
    known = (TRACED, *_SETTLED, *_OTHERWISE)
    told += [f"there is no {name!r}; {nearest(name, known)}" for name in parameters if name not in known]
    if TRACED in parameters:
        asked = {name.lower(): value for name, value in object_of(parameters[TRACED], TRACED).items()}
        if "starttimeinsecsinceepoch" in asked or "durationinseconds" in asked:
            told.append(f"{TRACED} names times; give StartStep and NumSteps")
        else:
            start = _number(asked.get("startstep", FIRST_TRACED), f"StartStep of {TRACED}", least=0)
            count = _number(asked.get("numsteps", 1), f"NumSteps of {TRACED}")
            found["trace"] = tuple(range(start + 1, start + count + 1))
    return found, told


def _number(value: Any, name: str, least: int = 1) -> int:
    if not str(value).isdecimal() or int(value) < least:
        raise UserError(f"{FILE}: {name} is {value!r}; give a whole number, {least} or more")
    return int(value)
