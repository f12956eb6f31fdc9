"""``dltrain train RECIPE [--preset NAME | --config FILE] [--nproc N] [--section.key value ...]``

Under a launcher (``srun dltrain train ...``, ``mpirun``, torchrun) each of these processes becomes the rank that it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.config import Config, split_arguments
from dltrain.config.describe import describe
from dltrain.errors import UserError
from dltrain.parallel.checks import check_layout
from dltrain.recipes import declarations, find, recipe_name
from dltrain.run_folder import choose_run
from dltrain.runtime.environment import Environment
from dltrain.runtime.launch import RECIPE, launch


def run(arguments: Sequence[str]) -> int:
    """Check everything that needs no torch, then start the ranks."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain train", add_help=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--preset", default="")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--nproc", type=int)
    parser.add_argument("-h", "--help", action="store_true")
    known = parser.parse_args(words)
    if known.help or known.recipe is None:
        print(_help(known.recipe, known.preset))
        return 0 if known.help else 2
    here = Environment.read()
    nproc = 1 if known.nproc is None else known.nproc
    if nproc < 1:
        raise UserError(f"--nproc is {nproc}; give 1 or more")
    if here.launcher and known.nproc is not None:
        raise UserError(f"--nproc is {nproc}, and {here.launcher} has started {here.world_size} rank(s): leave it out")
    config = declarations(known.recipe).configure(known.preset, overrides, known.config)
    check_layout(config, here if here.launcher else Environment(0, nproc, 0, nproc))
    command = [sys.executable, str(find(known.recipe)), "train"]
    command += ["--preset", known.preset] if known.preset else []
    command += ["--config", str(known.config)] if known.config else []
    command += [f"--{name}={value}" for name, value in overrides.items()]
    named = {RECIPE: recipe_name(known.recipe)}
    if here.launcher:  # signals are to reach the rank itself, so it takes this process's place
        os.execve(sys.executable, command, {**os.environ, **named})
    choose_run(config, recipe_name(known.recipe), known.preset)
    return launch(command, nproc, named)


def _help(recipe: str | None, preset: str) -> str:
    lines = [
        "usage: dltrain train RECIPE [--preset NAME | --config FILE] [--nproc N] [--section.key value ...]",
        "",
        "RECIPE is a name from `dltrain recipe ls`, or a file of yours ending in .py; N is the number of ranks here.",
        "Lengths and intervals carry a unit: 2ep (epochs), 100st (steps), 0.5h (hours).",
    ]
    config: Config = Config()
    if recipe is not None:
        declared = declarations(recipe)
        config = declared.configure(preset, {})
        lines += ["", f"Presets of {recipe}:"]
        lines += [f"  {name}: {(make.__doc__ or '').strip()}" for name, make in declared.presets.items()]
    return "\n".join([*lines, "", describe(config)])
