"""``dltrain recipe ls | show NAME | cp NAME FILE``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.recipes import copy, declarations, find, shipped


def run(arguments: Sequence[str]) -> int:
    """List, print or copy recipes."""
    parser = Parser(prog="dltrain recipe")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="recipes and their presets")
    commands.add_parser("show", help="print a recipe").add_argument("name")
    cp = commands.add_parser("cp", help="copy a recipe to a file of yours")
    cp.add_argument("name")
    cp.add_argument("target", type=Path)
    known = parser.parse_args(arguments)
    if known.command == "ls":
        for name in shipped():
            declared = declarations(name)
            print(f"{name}: {declared.summary}")
            for preset, make in declared.presets.items():
                print(f"  --preset {preset}: {(make.__doc__ or '').strip()}")
    elif known.command == "show":
        print(find(known.name).read_text(), end="")
    else:
        target = copy(known.name, known.target)
        print(f"copied {known.name} to {target}; run it with: dltrain train {target}")
    return 0
