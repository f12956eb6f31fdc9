"""Checks of a training job that is planned: its request, the image's torch, its metrics, and two steps of it in a
fabricated container here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dltrain.config import Config
from dltrain.doctor.checked import Checked
from dltrain.doctor.machine import LEAST_TORCH
from dltrain.hooks.printed import COLUMNS, step_line
from dltrain.recipes import recipe_name
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
    """Two steps in the folders and by the entry point of a container, on the CPU."""
    given = {"recipe": recipe_name(recipe), "preset": preset, "nproc": 1}
    given |= {name.replace(".", "__"): value for name, value in settings.items()} | STEPS
    if options.channels:
        yield Checked("trial", "doubtful", "left out: its data come by channels, which are not here; try it with "
                      "dltrain launch local --as-sagemaker --channel NAME=FOLDER")  # fmt: skip
        return
    with tempfile.TemporaryDirectory(prefix="dltrain-doctor-") as folder:
        made = Fabricated(Path(folder), 1, given)
        made.lay_down()
        (host,) = made.names
        environment = {**os.environ, **options.environment, **made.variables(host)}
        command = [sys.executable, "-m", "dltrain.sagemaker"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        reason = made.failure(host)
    if done.returncode:
        yield Checked("trial", "bad", f"two steps in a fabricated container ended with {done.returncode}: {reason}")
    else:
        yield Checked("trial", "good", "two steps in a fabricated container ended well")
