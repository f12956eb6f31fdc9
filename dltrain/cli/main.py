"""The command ``dltrain``: finds the command's module, and turns the user's mistakes into one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from dltrain import __version__
from dltrain.config import Config
from dltrain.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, nearest

COMMANDS = {
    "train": "train a recipe",
    "plan": "list the layouts of a recipe by memory and time",
    "verify": "compare a layout with one process",
    "eval": "score a run's best checkpoint and write its report",
    "recipe": "list, show and copy recipes",
    "runs": "list runs",
    "debug": "show what was found inside a run",
    "shards": "build, index, verify and list shards",
    "launch": "start a job here, on SageMaker, Slurm or Kubernetes",
    "node": "run one host's ranks of a job of several hosts",
    "doctor": "look at this machine, and at a planned job",
    "demo": "train the digits on two ranks from a local S3 endpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"dltrain {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"there is no command {words[0]!r}; {nearest(words[0], COMMANDS)}")
        return int(import_module(f"dltrain.cli.{words[0]}").run(words[1:]))
    except UserError as error:
        print(f"dltrain: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are :class:`UserError`."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see {self.prog} --help")


def _help() -> str:
    lines = ["usage: dltrain COMMAND ...", "", "Distributed training of image and time-series models.", ""]
    lines += [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    lines += ["", "Settings of `dltrain train`, with defaults: dltrain train --help", "Sections:"]
    for name, field in Config.model_fields.items():
        doc = (field.annotation.__doc__ or "").strip().splitlines() if field.annotation else [""]
        lines.append(f"  {name:11} {doc[0] if doc else ''}")
    return "\n".join(lines)
