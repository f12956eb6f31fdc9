"""``dltrain eval RUN [--nproc N] [--section.key value ...]``"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dltrain.cli.main import Parser
from dltrain.config import from_tree, load_overrides, split_arguments
from dltrain.errors import UserError
from dltrain.recipes import declarations, find
from dltrain.run_folder import find_run
from dltrain.runtime.launch import RECIPE, launch


def run(arguments: Sequence[str]) -> int:
    """Start the ranks that evaluate."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain eval", description="Score a run's best checkpoint; writes report/ in the run.")
    parser.add_argument("run", help="a run's folder, or its name in runs/")
    parser.add_argument("--nproc", type=int, default=1, help="ranks on this host")
    known = parser.parse_args(words)
    if known.nproc < 1:
        raise UserError(f"--nproc is {known.nproc}; give 1 or more")
    folder = find_run(known.run)
    record = folder.read()
    recipe = declarations(record["recipe"])
    load_overrides(from_tree(recipe.config, record["config"], str(folder.record)), overrides)
    command = [sys.executable, str(find(record["recipe"])), "eval", str(folder.path)]
    command += [f"--{name}={value}" for name, value in overrides.items()]
    return launch(command, known.nproc, {RECIPE: record["recipe"]})
