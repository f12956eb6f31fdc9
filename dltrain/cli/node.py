"""``dltrain node RECIPE --hosts N --head HOST:PORT --address NAME --nproc P``: this host's ranks, where a scheduler
starts one container on each host, as Kubernetes does.

It is fit to be process 1: it waits for the first host's name, starts ranks by torchrun's agent, hands signals on and
reaps. It exits 0, 2 after the user's mistake, 75 where the job was asked to stop and has saved, else another status.
The host whose address is the head's listens for the others.
"""

from __future__ import annotations

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from dltrain.cli.main import Parser
from dltrain.config import Config, split_arguments
from dltrain.errors import EXIT_INTERRUPTED, UserError
from dltrain.parallel.checks import check_layout
from dltrain.recipes import declarations, find, recipe_name
from dltrain.runtime.environment import Environment, cores
from dltrain.runtime.host import run_host
from dltrain.runtime.logs import outlive_readers
from dltrain.runtime.meeting import PORT, agent, patience, wait_for

RESERVE = 10.0
"""Seconds of ``run.grace`` that are left for ending what has not ended by itself, at most half of it."""


def run(arguments: Sequence[str]) -> int:
    """Check everything that needs no torch, wait for the head's name, run the ranks; returns the exit status."""
    words, overrides = split_arguments(arguments)
    parser = Parser(prog="dltrain node", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--preset", default="")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--head", default=f"localhost:{PORT}", help="HOST:PORT of the first host")
    parser.add_argument("--address", default="localhost", help="by what name the others reach this host")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of each host")
    parser.add_argument("--job", default="dltrain", help="a name that all hosts of the job share, and no other job")
    known = parser.parse_args(words)
    _check(known)
    outlive_readers()
    config = declarations(known.recipe).configure(known.preset, overrides)
    check_layout(config, Environment(0, known.nproc * known.hosts, 0, known.nproc))
    signal.signal(signal.SIGTERM, _leave)  # which the kernel keeps from a process 1 that does not ask for it
    try:
        wait_for([known.head.rpartition(":")[0]], patience())
    except UserError as error:  # not the user's mistake here: the scheduler may bring that host yet
        print(f"dltrain: error: {error}", file=sys.stderr, flush=True)
        return 1
    return _run(known, config, overrides)


def _leave(number: int, frame: FrameType | None) -> None:
    print("dltrain: SIGTERM came and there was nothing to save yet", file=sys.stderr, flush=True)
    sys.exit(EXIT_INTERRUPTED)


def _check(known: Namespace) -> None:
    if known.hosts < 1 or known.nproc < 1:
        raise UserError(f"--hosts is {known.hosts} and --nproc {known.nproc}; give 1 or more of each")
    host, colon, port = known.head.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"--head is {known.head!r}; give HOST:PORT of the first host")


def _run(known: Namespace, config: Config, overrides: Mapping[str, str]) -> int:
    threads, grace = config.run.threads or max(1, cores() // known.nproc), config.run.grace
    apart = f"{known.hosts} hosts did not come together at {known.head}"
    grace = max(grace - RESERVE, grace / 2)
    command = partial(_command, known, overrides)
    ending = run_host(command, recipe_name(known.recipe), threads, time.time(), grace, apart)
    if ending.told:
        print(ending.told if ending.failure else f"dltrain: {ending.told}", file=sys.stderr, flush=True)
    elif ending.status:
        print(f"dltrain: the ranks could not be started (status {ending.status})", file=sys.stderr, flush=True)
    return ending.status


def _command(known: Namespace, overrides: Mapping[str, str], report: Path) -> list[str]:
    command = agent(report, known.nproc, known.hosts, known.head, known.address, known.job)
    command += [str(find(known.recipe)), "train", *([f"--preset={known.preset}"] * bool(known.preset))]
    return [*command, *(f"--{name}={value}" for name, value in overrides.items())]
