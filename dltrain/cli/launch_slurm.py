"""``dltrain launch slurm RECIPE --preset NAME --nodes N --gpus-per-node G ... [--submit] [--section.key value ...]``

Fills in ``launch/slurm.sbatch``: a batch script that saves before its time limit, and goes on after it, after
preemption and after a node's failure. It is printed, written with ``--output``, or submitted.
"""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.cli.templates import filled, hand_over, settings_of, stem_of
from dltrain.config import Config, split_arguments
from dltrain.errors import UserError

LEAD = 120
"""Seconds before the time limit that ranks are asked to save, if nothing else is said."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
_WORD = re.compile(r"[\w.,:@=+/%-]*")


def run(arguments: Sequence[str]) -> int:
    """Check it, fill it in, and print, write or submit it; returns 0, or the status of ``sbatch``."""
    words, overrides = split_arguments(arguments)
    known = _parser().parse_args(words)
    _check(known)
    nproc = known.nproc or known.gpus_per_node or 1
    settings = {"run.grace": str(known.lead), **overrides, "run.resume": overrides.get("run.resume", "auto")}
    config = settings_of(known.recipe, known.preset, settings, known.nodes, nproc)
    text = filled("slurm.sbatch", _values(known, config, settings, nproc))
    return hand_over(text, known.output, ["sbatch"] * known.submit)


def _parser() -> Parser:
    parser = Parser(prog="dltrain launch slurm", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--preset", default="")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=0, help="ranks of each node; its GPUs, if it is not given")
    parser.add_argument("--cpus-per-task", type=int, default=0, help="cores of each rank and its loader processes")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--time", default="", help="the time limit, such as 12:00:00 or 2-00:00:00")
    parser.add_argument("--lead", type=int, default=LEAD, help="seconds before it that ranks save: run.grace")
    parser.add_argument("--name", default="", help="of the job")
    parser.add_argument("--log", default="%x-%j.out", help="what sbatch calls --output")
    parser.add_argument("--container", default="", help="image, where the cluster has the plugin Pyxis")
    parser.add_argument("--output", type=Path, help="write the script to this file")
    parser.add_argument("--submit", action="store_true", help="hand it to sbatch")
    return parser


def _check(known: Namespace) -> None:
    for name in ("partition", "account", "name", "log", "container"):
        value = getattr(known, name)
        if not _WORD.fullmatch(value):
            raise UserError(f"--{name} is {value!r}; give letters, digits and . , : @ = + / % _ - alone")
    for name in ("gpus_per_node", "nproc", "cpus_per_task"):
        if getattr(known, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(known, name)}; give 0 or more")
    if not 1 <= known.lead <= 65535:
        raise UserError(f"--lead is {known.lead}; sbatch takes 1 to 65535 seconds")
    if known.time and seconds(known.time) <= known.lead:
        raise UserError(f"--time {known.time} is not longer than --lead {known.lead} s; give a longer --time")


def seconds(time: str) -> int:
    """Of a time as Slurm has it: ``30`` minutes, ``30:00``, ``12:00:00``, ``2-12``, ``2-12:30`` or ``2-12:30:00``.

    Raises :class:`UserError`.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise UserError(f"--time is {time!r}; give HH:MM:SS, or D-HH:MM:SS")
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"]:
        return int(found["days"]) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if found["third"] else first * 60 + second


def _values(known: Namespace, config: Config, settings: Mapping[str, str], nproc: int) -> dict[str, str | int]:
    stem = known.name or stem_of(known.recipe, known.preset)
    named = settings.get("run.name", "")
    command = ["python", "-m", "dltrain", "train", known.recipe, *([f"--preset={known.preset}"] * bool(known.preset))]
    command += [f"--{name}={value}" for name, value in settings.items() if name != "run.name"]
    return {
        "name": stem,
        "nodes": known.nodes,
        "nproc": nproc,
        "gpus_per_node": known.gpus_per_node or "",
        "cpus_per_task": known.cpus_per_task or "",
        "partition": known.partition,
        "account": known.account,
        "time": known.time,
        "log": known.log,
        "lead": known.lead,
        "container": known.container,
        "run": shlex.quote(named) if named else f"{stem}-$SLURM_JOB_ID",
        "folder": shlex.quote(str(Path(config.run.folder).expanduser())),
        "command": shlex.join(command),
    }
