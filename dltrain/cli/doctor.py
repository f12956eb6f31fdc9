"""``dltrain doctor [--s3 s3://bucket/prefix] [--sagemaker job.yaml RECIPE --preset NAME --section.key value ...]``

Looks at this machine, and at what a run would use: says what is good, what is doubtful, what is bad and how to mend it.
Exits 1 where anything is bad.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dltrain.cli.main import Parser
from dltrain.config import split_arguments
from dltrain.doctor import machine
from dltrain.doctor.checked import Check, Checked, all_of
from dltrain.errors import UserError
from dltrain.recipes import declarations

_MARKS = {"good": "good    ", "doubtful": "DOUBTFUL", "bad": "BAD     "}


def run(arguments: Sequence[str]) -> int:
    """Make all checks, each told as it is made."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain doctor", description=__doc__)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--preset", default="")
    parser.add_argument("--s3", default="", help="write, read and delete 16 MiB below this address")
    parser.add_argument("--sagemaker", type=Path, metavar="JOB.yaml", help="options of a training job, to be checked")
    known = parser.parse_args(words)
    if known.sagemaker is not None and known.recipe is None:
        raise UserError("--sagemaker needs the recipe that the job is to run: dltrain doctor --sagemaker FILE RECIPE")
    checks = [*_of_machine(), *_of_s3(known.s3)]
    if known.sagemaker is not None:
        checks += _of_job(known.recipe, known.preset, overrides, known.sagemaker)
    found = [_told(each) for each in all_of(checks)]
    counts = {state: sum(each.state == state for each in found) for state in _MARKS}
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["bad"] else 0


def _of_machine() -> Iterator[tuple[str, Check]]:
    yield "versions", machine.versions
    yield "gpus", machine.gpus
    yield "efa", machine.adapter
    yield "shared memory", machine.shared_memory
    yield "open files", machine.open_files
    yield "disk", machine.disk
    yield "ranks", machine.ranks


def _of_s3(url: str) -> Iterator[tuple[str, Check]]:
    if url:
        from dltrain.doctor import store  # slow to import

        yield "s3", partial(store.place, url)
        yield "clock", partial(store.clock, url)


def _of_job(recipe: str, preset: str, overrides: dict[str, str], file: Path) -> Iterator[tuple[str, Check]]:
    from dltrain.doctor import job
    from dltrain.sagemaker.options import read_options

    options = read_options(file, {})
    config = declarations(recipe).configure(preset, overrides)
    yield "request", partial(job.request, recipe, preset, overrides, config, options)
    yield "image", partial(job.image, options)
    yield "trial", partial(job.trial, recipe, preset, overrides, options)


def _told(each: Checked) -> Checked:
    print(f"{_MARKS[each.state]}  {each.name}: {each.said}")
    sys.stdout.flush()
    return each
