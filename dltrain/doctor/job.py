"""Checks of a training job that is planned: its request, the image's torch, its metrics, and two steps of it in a
fabricated container here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dltrain.config import Config
from dltrain.doctor.checked import Checked
from dltrain.doctor.machine import LEAST_TORCH
from dltrain.hooks.printed import COLUMNS, step_line
from dltrain.sagemaker.code import is_users, read_code
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.options import JobOptions
from dltrain.sagemaker.request import build

STEPS = {"run__length": "2st", "schedule__warmup": "0st", "logging__every": "1st", "evaluation__report": False}
"""Of the trial: two steps, whatever the recipe says."""


def request(
    recipe: str, preset: str, settings: Mapping[str, Any], config: Config, options: JobOptions
) -> Iterator[Checked]:
    """That SageMaker would take it."""
    found = build(recipe, preset, settings, config, options)
    count = len(found["HyperParameters"])
    yield Checked("request", "good", f"fits SageMaker's limits; {count} hyperparameters")
    record = {"step": 1, "epoch": 0.1, **{column.key: 0.5 for column in COLUMNS}}
    line = step_line(record, "10")
    definitions = found["AlgorithmSpecification"]["MetricDefinitions"]
    of_steps = [each for each in definitions if each["Name"].startswith("train:")]
    blind = [each["Name"] for each in of_steps if not re.search(each["Regex"], line)]
    more = f"; not found in a printed line: {', '.join(blind)}" if blind else ""
    yield Checked("metrics", "bad" if blind else "good", f"{len(definitions)} definitions{more}")


def image(options: JobOptions) -> Iterator[Checked]:
    """The version of torch that its tag names, if it does: it lies elsewhere, and is not fetched."""
    match = re.search(r"pytorch[^:]*:(\d+)\.(\d+)", options.image)
    if match is None:
        yield Checked(
            "image", "good", f"{options.image}: its tag does not say which torch it has; it needs 2.11 or more"
        )
        return
    old = (int(match[1]), int(match[2])) < LEAST_TORCH
    more = "; dltrain needs 2.11 or later" if old else ""
    yield Checked("image", "bad" if old else "good", f"{options.image} has torch {match[1]}.{match[2]}{more}")


def trial(recipe: str, preset: str, settings: Mapping[str, Any], options: JobOptions) -> Iterator[Checked]:
    """Two steps in the folders and by the entry point of a container, with the code that the job would have, on the
    CPU."""
    if options.channels:
        yield Checked("trial", "doubtful", "left out: its data come by channels, which are not here; try it with "
                      "dltrain launch local --as-sagemaker --channel NAME=FOLDER")  # fmt: skip
        return
    code = read_code(recipe, options.source, options.ignore) if is_users(recipe) else None
    given = {"recipe": recipe if code is None else code.recipe, "preset": preset, "nproc": 1}
    given |= {name.replace(".", "__"): value for name, value in settings.items()} | STEPS
    with tempfile.TemporaryDirectory(prefix="dltrain-doctor-") as folder:
        made = Fabricated(Path(folder), 1, given, code=code)
        made.lay_down()
        (host,) = made.names
        status = _status(made.start(host, options.environment))
        reason = made.failure(host)
    if status:
        yield Checked("trial", "bad", f"two steps in a fabricated container ended with {status}: {reason}")
    else:
        yield Checked("trial", "good", "two steps in a fabricated container ended well")


def _status(host: subprocess.Popen[str]) -> int:
    """How it has ended; before its folders go, whatever happens here."""
    with host:
        try:
            host.communicate()
        finally:
            host.terminate()
    return host.returncode
