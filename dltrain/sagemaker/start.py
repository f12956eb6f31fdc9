"""What a host of a training job is to run: recipe, settings and number of ranks, checked before anything is started."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from importlib.util import find_spec
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

KEPT = ("torch", "torchvision", "deepspeed", "numpy", "dltrain")
"""Packages that the user's requirements must leave as they are: another torch would not fit the image's CUDA."""

MOST_SAID = 400
"""Characters of an installer's complaint: the whole reason of a failure has 1,024."""

PATIENCE = 60.0
"""Seconds that nvidia-smi may take: the driver of a host that has just started is slow."""

_WITH_GPUS = re.compile(r"(ml\.)?(p|gr?)\d")
"""Begins the types of instances that have GPUs of NVIDIA's: ml.p5.48xlarge, ml.g4dn.xlarge, ml.g5g.xlarge."""


@dataclass(frozen=True)
class Start:
    """What this host is to run."""

    recipe: Path
    name: str
    arguments: tuple[str, ...]
    config: Config
    nproc: int
    code: Path | None = None
    """The folder of the user's code, whose modules ranks may import."""


def install_requirements(job: TrainingJob) -> None:
    """What ``requirements.txt`` beside the user's recipe asks for, as far as the image's torch and what belongs to it
    stay as they are. Raises :class:`UserError` where it cannot be installed."""
    files = [folder / REQUIREMENTS for folder in code_folders(job.folders)]
    for file in (each for each in files if each.is_file()):
        print(f"dltrain: installing {file}", file=sys.stderr, flush=True)
        kept = [f"{name}=={version}" for name in KEPT if (version := _installed(name))]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(kept))
            constraints.flush()
            command = [*_installer(file), "--quiet", "--constraint", constraints.name, "--requirement", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)  # paths are relative to it
        if done.returncode:
            raise UserError(
                f"{file} cannot be installed: {_reason(done)}; {', '.join(kept)} stay as the image has them, and with "
                "network isolation, or without a route to a package index, packages must be in the image"
            )


def _installed(name: str) -> str:
    try:
        return version_of(name)
    except PackageNotFoundError:
        return ""


def _installer(file: Path) -> list[str]:
    """pip of this Python, or uv, by which images are made that have no pip. Raises :class:`UserError`."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    uv = shutil.which("uv")
    if uv is None:
        raise UserError(
            f"{file} cannot be installed: the image has neither pip nor uv; put one of them into it, or the packages"
        )
    return [uv, "pip", "install", "--python", sys.executable]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """pip's first complaint, for the last is an address of its manual; uv makes one sentence over several lines."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
    complaints = [line for line in lines if line.startswith("ERROR:")]
    words = complaints[0].removeprefix("ERROR:") if complaints else " ".join(lines)
    return " ".join(words.split())[:MOST_SAID] or f"status {done.returncode}"


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
    nproc = int(known.nproc) if known.nproc else gpus(job.instance_type) or 1
    code = _code_of(known.recipe)
    name = known.recipe if code is None else str(code / known.recipe)
    file = Path(known.config) if known.config else None
    settings = kept({**job.hyperparameters.settings, **overrides}, job)
    config = declarations(name).configure(known.preset, settings, file)
    config = apply_channels(config, job.channels, settings)  # rank 0 tells what follows from it
    check_layout(config, Environment(0, nproc * len(job.hosts), 0, nproc))
    options = [f"--preset={known.preset}"] * bool(known.preset) + [f"--config={file}"] * bool(file)
    options += [f"--{key}={value}" for key, value in overrides.items()]
    return Start(find(name), recipe_name(name), tuple(options), config, nproc, code)


def _code_of(recipe: str) -> Path | None:
    """Where SageMaker has unpacked the source code that the user's file is of."""
    inside = recipe.endswith(".py") and not Path(recipe).is_absolute()
    folders = code_folders(Folders.read()) if inside else []
    return next((folder for folder in folders if (folder / recipe).is_file()), None)


def gpus(instance_type: str) -> int:
    """GPUs of this host, without torch: asking it would hold memory on each.

    Raises :class:`UserError` where nvidia-smi cannot tell on an instance of a type that has some: a rank on its CPU
    would be as dear as all of its GPUs.
    """
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=PATIENCE)
    except OSError as error:
        found, seen = 0, f"nvidia-smi cannot be started ({error.strerror})"
    except subprocess.TimeoutExpired:
        found, seen = 0, f"nvidia-smi has not answered within {PATIENCE:g} s"
    else:
        found = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if not done.returncode else 0
        said = " ".join((done.stderr or done.stdout).split())[:MOST_SAID]
        seen = f"nvidia-smi ended with status {done.returncode}: {said}" if done.returncode else "nvidia-smi lists none"
    if not found and _WITH_GPUS.match(instance_type):
        raise UserError(
            f"{instance_type} has GPUs, and none are seen here: {seen}; take an image with NVIDIA's CUDA, as those of "
            "launch/Dockerfile are, or start the job again on another host; nproc starts so many ranks all the same"
        )
    return found
