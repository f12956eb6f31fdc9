"""``dltrain launch local ...``: start a job where it is to run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from dltrain.errors import UserError, nearest

PLACES = {
    "local": "this machine; with --as-sagemaker in the folders and by the entry point of a training container",
    "sagemaker": "a training job; --dry-run prints its request",
    "slurm": "a batch script, printed, written or submitted",
    "kubernetes": "a Job and its Service, printed, written or applied",
}


def run(arguments: Sequence[str]) -> int:
    """Start it there; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: dltrain launch PLACE ...\n")
        print("\n".join(f"  {name:10} {text}" for name, text in PLACES.items()))
        return 0 if arguments else 2
    if arguments[0] not in PLACES:
        raise UserError(f"there is no place {arguments[0]!r} to launch at; {nearest(arguments[0], PLACES)}")
    return int(import_module(f"dltrain.cli.launch_{arguments[0]}").run(arguments[1:]))
