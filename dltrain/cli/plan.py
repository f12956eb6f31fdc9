"""``dltrain plan RECIPE --world 64 --memory 80GB --device h100 [--preset NAME] [--section.key value ...]``"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dltrain.cli.main import Parser
from dltrain.cli.sizes import size_of
from dltrain.config import split_arguments
from dltrain.errors import UserError
from dltrain.parallel.devices import device_of
from dltrain.recipes import declarations, find, recipe_name
from dltrain.runtime.launch import RECIPE, launch

_WHAT = (
    "List every layout of a recipe over so many ranks, with memory, communication and time of a step, the quickest "
    "first and what does not fit last. Nothing is trained and no GPU is needed. Settings such as --parallel.tp 2 "
    "leave only layouts that have them."
)


def run(arguments: Sequence[str]) -> int:
    """Check what was asked, and let the recipe answer."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain plan", description=_WHAT)
    parser.add_argument("recipe", help="a name from `dltrain recipe ls`, or a file of yours")
    parser.add_argument("--preset", default="")
    parser.add_argument("--world", type=int, required=True, help="ranks of all nodes")
    parser.add_argument("--device", default="h100", help="one of dltrain/parallel/devices.py (default: %(default)s)")
    parser.add_argument("--memory", default="", help="of a rank, such as 80GB (default: the device's)")
    parser.add_argument("--node-ranks", type=int, default=8, help="ranks of a node (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="layouts shown (default: %(default)s)")
    known = parser.parse_args(words)
    for name in ("world", "node_ranks", "top"):
        if getattr(known, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(known, name)}; give 1 or more")
    if known.world > known.node_ranks and known.world % known.node_ranks:
        raise UserError(f"--world {known.world} is no multiple of --node-ranks {known.node_ranks}; give full nodes")
    device = device_of(known.device)
    memory = size_of("--memory", known.memory) if known.memory else int(device.memory)
    declarations(known.recipe).configure(known.preset, overrides)
    command = [sys.executable, str(find(known.recipe)), "plan", device.name, "--world", str(known.world)]
    command += ["--memory", str(memory), "--node-ranks", str(known.node_ranks), "--top", str(known.top)]
    command += ["--preset", known.preset] if known.preset else []
    command += [f"--{name}={value}" for name, value in overrides.items()]
    return launch(command, 1, {RECIPE: recipe_name(known.recipe)})
