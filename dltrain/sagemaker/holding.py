"""A place of fabricated hosts is one job's at a time, until the last process of its hosts has ended.

    with held(root) as lock:
        subprocess.Popen(command, pass_fds=(lock,))

A launcher that is killed leaves hosts that still save and write. So there are two locks of the kernel's: one that the
launcher has alone, and one that it shares with the first process of each host.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from dltrain.errors import UserError
from dltrain.runtime.meeting import PORT_SAID

BASE_SAID = "SAGEMAKER_BASE_DIR"
"""Variable that tells a host's processes what is ``/opt/ml`` to them."""

PATIENCE = 30.0
"""Seconds that hosts whose launcher is gone have to end."""


@contextmanager
def held(root: Path) -> Iterator[int]:
    """Keep others out of the folder; the descriptor of a lock that hosts are to have as well.

    Raises :class:`UserError` where another process uses it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as launcher, (root / ".hosts").open("w") as hosts:
        if not _locked(launcher) or not _ended(root, hosts):
            raise UserError(f"another job runs in {root}; wait for it, or give another --base")
        yield hosts.fileno()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ended(root: Path, hosts: IO[str]) -> bool:
    """Wait for the hosts of a launcher that is gone; whether they have ended in time."""
    until, told = time.monotonic() + PATIENCE, False
    while not _locked(hosts) or _has_processes(root):
        if time.monotonic() > until:
            return False
        if not told:
            print(f"hosts of an earlier job in {root} are still ending; waiting for them", file=sys.stderr, flush=True)
        told = True
        time.sleep(0.2)
    return True


def _has_processes(root: Path) -> bool:
    """Whether ranks are left there: they outlive the first process of their host, which has the lock, if it is
    killed."""
    others = (each for each in psutil.process_iter() if each.pid != os.getpid())
    return any(_base_of(each).is_relative_to(root.resolve()) for each in others)


def _base_of(process: psutil.Process) -> Path:
    try:
        said = process.environ()
        return Path(said.get(BASE_SAID, "")) if PORT_SAID in said else Path()  # which a user's shell has not
    except (psutil.Error, OSError):  # it has ended meanwhile, or is another user's
        return Path()
