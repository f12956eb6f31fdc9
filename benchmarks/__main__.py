"""The command ``python -m benchmarks``. Imports no torch before a benchmark is chosen.

Exits 0, or 2 with one sentence after the user's mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.result import RESULTS, WORK, Request
from dltrain.errors import EXIT_USER_ERROR, UserError, nearest

BENCHMARKS = {
    "data": "samples per second, resume and memory of the data path, beside other libraries",
    "throughput": "images per second of ResNet-18 and ViT-B/16: the Trainer against a bare PyTorch loop",
    "trainer_overhead": "microseconds the Trainer adds to a step of a small model",
    "parity": "dltrain verify of every engine and schedule; writes docs/parity.md",
    "parallel": "CPU seconds of a step under each layout: the Trainer against plain PyTorch by hand",
    "debugger": "what statistics of tensors and rules cost, on steps that are due and on others",
    "smdebug": "CPU seconds of statistics beside SageMaker Debugger's hook, which needs an environment of its own",
    "report": "write results/README.md anew from the stored results",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see python -m benchmarks --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark, whose last line on standard output is its result as one JSON object."""
    try:
        known = _parser().parse_args(arguments)
        if known.name not in BENCHMARKS:
            raise UserError(f"there is no benchmark {known.name!r}; {nearest(known.name, BENCHMARKS)}")
        if known.name != "data" and (known.peers or known.work != WORK):
            raise UserError(f"--peers and --work belong to the benchmark 'data', not to {known.name!r}")
        if known.name != "smdebug" and known.peer_python:
            raise UserError(f"--peer-python belongs to the benchmark 'smdebug', not to {known.name!r}")
        request = Request(**vars(known))
        print(json.dumps(import_module(f"benchmarks.{known.name}").run(request)), flush=True)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:17} {text}" for name, text in BENCHMARKS.items())
    parser = _Parser(
        prog="python -m benchmarks",
        description=f"Measure dltrain and store the result.\n\nbenchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of the benchmarks above")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds: a minute or so on two cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to measure")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where results are stored")
    parser.add_argument("--peers", action="store_true", help="data: beside all peers, installed for it on first use")
    parser.add_argument("--peer-python", default="", metavar="PYTHON", help="smdebug: the interpreter that has it")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="data: where its files are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
