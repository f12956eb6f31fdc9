"""``dltrain runs ls [--folder runs]``"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.errors import UserError
from dltrain.run_folder import RunFolder, all_runs, read_lines


def run(arguments: Sequence[str]) -> int:
    """Print a table of runs, oldest first."""
    parser = Parser(prog="dltrain runs")
    ls = parser.add_subparsers(dest="command", required=True).add_parser("ls", help="runs, oldest first")
    ls.add_argument("--folder", type=Path, default=Path("runs"))
    known = parser.parse_args(arguments)
    if not known.folder.is_dir():
        raise UserError(f"there is no folder {known.folder}; name the one that holds your runs with --folder")
    runs = all_runs(known.folder)
    rows = [("run", "recipe", "status", "step", "started", "scores"), *map(_row, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(runs)} runs in {known.folder}")
    return 0


def _row(run: RunFolder) -> tuple[str, ...]:
    record, lines = run.read(), read_lines(run.metrics)
    scores = [line for line in lines if line["kind"] == "evaluation"]
    last = scores[-1] if scores else {}
    shown = [f"{k.removeprefix('evaluation/')} {v:.4g}" for k, v in last.items() if k.startswith("evaluation/")]
    step = str(lines[-1]["step"]) if lines else "0"
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["created"]))
    recipe = f"{record['recipe']} {record['preset']}".strip()
    status = "died" if record["status"] == "running" and not run.is_held else record["status"]
    return (run.name, recipe, status, step, started, ", ".join(shown[:3]))
