"""The files of ``launch/``: found, filled in, and printed, written or handed to a command.

    text = filled("slurm.sbatch", {"name": "digits", "nodes": 2, "account": ""})

``{{name}}`` stands for a value; a line that holds one whose value is empty is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import dltrain
from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.parallel.checks import check_layout
from dltrain.recipes import declarations
from dltrain.runtime.environment import Environment

_NAME = re.compile(r"\{\{(\w+)\}\}")


def folder() -> Path:
    """Where the templates are: inside the package, or beside it in a checkout."""
    package = Path(dltrain.__file__).parent
    inside = package / "launch"
    return inside if inside.is_dir() else package.parent / "launch"


def filled(name: str, values: Mapping[str, str | int]) -> str:
    """The template with its values."""
    lines = (folder() / name).read_text().splitlines(keepends=True)
    kept = [line for line in lines if all(values[key] != "" for key in _NAME.findall(line))]
    return "".join(_NAME.sub(lambda found: str(values[found[1]]), line) for line in kept)


def settings_of(recipe: str, preset: str, given: Mapping[str, str], nodes: int, nproc: int) -> Config:
    """The config that the job will have, checked for that many ranks. Raises :class:`UserError`."""
    if nodes < 1 or nproc < 1:
        raise UserError(f"--nodes is {nodes} and there are {nproc} ranks on each; give 1 or more of both")
    if given.get("run.resume", "auto") != "auto":
        raise UserError(
            f"--run.resume is {given['run.resume']!r}: the job goes on with its own run; name that with --run.name"
        )
    config = declarations(recipe).configure(preset, given)
    check_layout(config, Environment(0, nproc * nodes, 0, nproc))
    return config


def stem_of(recipe: str, preset: str) -> str:
    """A name for the job of letters, digits and hyphens: ``image/classify`` with ``digits`` is ``classify-digits``."""
    return re.sub(r"[^a-z0-9]+", "-", f"{Path(recipe).stem}-{preset}".lower()).strip("-")


def hand_over(text: str, output: Path | None, command: Sequence[str]) -> int:
    """Write it to ``output``, give it to a ``command`` that reads it from standard input, or else print it; returns the
    command's status. Raises :class:`UserError` for a file that cannot be written and a command that there is not."""
    if output is not None:
        try:
            output.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from None
        print(f"wrote {output}", file=sys.stderr)
    if command:
        try:
            return subprocess.run(command, input=text, text=True).returncode
        except FileNotFoundError:
            raise UserError(
                f"there is no command {command[0]} here; write it with --output, and take it there"
            ) from None
    if output is None:
        print(text, end="")
    return 0
