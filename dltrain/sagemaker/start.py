"""What a host of a training job is to run: recipe, settings and number of ranks, checked before anything is started."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dltrain.config import Config, split_arguments
from dltrain.errors import UserError
from dltrain.parallel.checks import check_layout
from dltrain.recipes import declarations, find, recipe_name
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import CODE, apply_channels
from dltrain.sagemaker.code import REQUIREMENTS
from dltrain.sagemaker.folders import Folders
from dltrain.sagemaker.placing import kept
from dltrain.sagemaker.training_job import TrainingJob


@dataclass(frozen=True)
class Start:
    """What this host is to run."""

    recipe: Path
    name: str
    arguments: tuple[str, ...]
    config: Config
    nproc: int


def install_requirements(job: TrainingJob) -> None:
    """What ``requirements.txt`` beside the user's recipe asks for. Raises :class:`UserError` where pip fails."""
    files = [folder / REQUIREMENTS for folder in code_folders(job.folders)]
    for file in (each for each in files if each.is_file()):
        print(f"dltrain: installing {file}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-r", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                f"{file} cannot be installed: {said[-1] if said else done.returncode}; with network isolation, or "
                "without a route to a package index, packages must be in the image"
            )


def code_folders(folders: Folders) -> list[Path]:
    """Where the user's code may lie: as the toolkit says, as SDK v3's drivers do, or as our own request brings it."""
    said = [Path(os.environ[name]) for name in ("SM_MODULE_DIR", "SM_SOURCE_DIR") if os.environ.get(name)]
    return [*said, folders.base / "code", folders.data / CODE]


def read_start(job: TrainingJob, arguments: Sequence[str]) -> Start:
    """What to run, checked as far as it can be without torch. Raises :class:`UserError`."""
    words, overrides = split_arguments(arguments)
    parser = argparse.ArgumentParser(prog="python -m dltrain.sagemaker")
    parser.add_argument("recipe", nargs="?", default=job.hyperparameters.words.get("recipe", ""))
    parser.add_argument("--preset", default=job.hyperparameters.words.get("preset", ""))
    parser.add_argument("--config", default=job.hyperparameters.words.get("config", ""))
    parser.add_argument("--nproc", default=job.hyperparameters.words.get("nproc", ""))
    known = parser.parse_args(words)
    if not known.recipe:
        raise UserError(
            "no recipe is named; give the hyperparameter recipe, such as image/classify or a file of your source code"
        )
    if known.nproc and not (known.nproc.isdecimal() and int(known.nproc)):
        raise UserError(f"nproc is {known.nproc!r}; give the number of ranks of a host, 1 or more")
    if not known.nproc and len(kinds := {group.instance_type for group in job.groups}) > 1:
        raise UserError(
            f"the job's groups are of {' and '.join(sorted(kinds))}, and every host must run the same number of ranks: "
            "give nproc, or take instances of one type"
        )
    nproc = int(known.nproc) if known.nproc else gpus() or 1
    name = _in_the_code(known.recipe)
    file = Path(known.config) if known.config else None
    settings = kept({**job.hyperparameters.settings, **overrides}, job)
    config = declarations(name).configure(known.preset, settings, file)
    config = apply_channels(config, job.channels, settings)  # rank 0 tells what follows from it
    check_layout(config, Environment(0, nproc * len(job.hosts), 0, nproc))
    options = [f"--preset={known.preset}"] * bool(known.preset) + [f"--config={file}"] * bool(file)
    options += [f"--{key}={value}" for key, value in overrides.items()]
    return Start(find(name), recipe_name(name), tuple(options), config, nproc)


def _in_the_code(recipe: str) -> str:
    """A user's file is looked for where SageMaker unpacks the source code."""
    folders = code_folders(Folders.read())
    found = [folder / recipe for folder in folders if recipe.endswith(".py") and (folder / recipe).is_file()]
    return str(found[0]) if found else recipe


def gpus() -> int:
    """GPUs of this host, without torch: asking it would hold memory on each."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
