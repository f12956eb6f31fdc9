"""Starting the ranks of one host, and ending all of them when one fails. Imports no torch.

Each rank is an ordinary process with the variables torchrun would set, so a script cannot tell the two apart. A rank
that fails leaves word of what happened (:mod:`dltrain.runtime.word`); the launcher shows the first failure alone, not
the collapse of its peers.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Self

from dltrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from dltrain.runtime.environment import HOSTS, cores
from dltrain.runtime.word import FAILURES, failures_in, ready_in, running_in, stopped_in

RECIPE = "DLTRAIN_RECIPE"
"""Variable that says by what name the recipe was started."""

GRACE_SECONDS = 5.0
"""How long the other ranks have to end after one failed, before they are killed."""


def launch(command: Sequence[str], ranks: int, variables: Mapping[str, str] | None = None) -> int:
    """Run ``command`` as ``ranks`` processes; returns 0, the failing rank's status, or ``EXIT_STOPPED``."""
    with tempfile.TemporaryDirectory(prefix="dltrain-") as folder:
        base = {**os.environ, **(variables or {}), FAILURES: folder}
        port = free_port()
        processes: list[subprocess.Popen[bytes]] = []
        with _Forwarded(processes, Path(folder)) as forwarded:
            for rank in range(ranks):
                variables = base | rank_variables(rank, ranks, port)
                # a group of its own: a terminal's Ctrl-C reaches the launcher alone, which hands it on once
                processes.append(subprocess.Popen(command, env=variables, process_group=0))
            first, killed = _wait(processes, Path(folder))
        if forwarded.cut_short:
            print("dltrain: interrupted before there was anything to save", file=sys.stderr)
            return EXIT_INTERRUPTED
        return _verdict(processes, first, killed, Path(folder))


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank of one host; threads are shared out, for too many cost 4.7 times the time."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        HOSTS: "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // ranks))),
    }


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Forwarded:
    """Hands signals on to the ranks while they run; a closed terminal's as SIGTERM."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self.cut_short = False
        """Whether ranks were ended before they listened."""
        self._before: dict[int, signal._HANDLER] = {}

    def _send(self, number: int, frame: FrameType | None) -> None:
        ready = ready_in(self._folder)
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                continue
            if rank in ready:
                process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
            else:
                process.kill()
                self.cut_short = True

    def __enter__(self) -> Self:
        caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._send) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> tuple[set[int], set[int]]:
    """Until all have ended, or one has failed and the rest were ended; returns the ranks that were seen to fail first,
    and those that had to be killed."""
    while True:
        failed = {rank for rank, process in enumerate(processes) if _failed(process, rank, folder)}
        if failed:
            return failed, _end(processes)
        if all(process.poll() is not None for process in processes):
            return set(), set()
        time.sleep(0.02)


def _failed(process: subprocess.Popen[bytes], rank: int, folder: Path) -> bool:
    status = process.poll()
    return status is not None and (status != 0 or rank in running_in(folder))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Give the survivors time to fail by themselves (and so to say why), then kill them."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = {rank for rank, process in enumerate(processes) if process.poll() is None}
    for rank in left:
        processes[rank].kill()
        processes[rank].wait()
    return left


def _verdict(processes: Sequence[subprocess.Popen[bytes]], first: set[int], killed: set[int], folder: Path) -> int:
    """Show what came first in the chain: the user's mistake, else a rank that died without a word, else an exception.

    The collapse of peers that waited for a dead rank is not shown. A rank that was aborted is such a peer where another
    has told of an exception: gloo and NCCL abort when their peers are gone.
    """
    failures = failures_in(folder)
    mistakes = [failure for failure in failures if failure.status == EXIT_USER_ERROR]
    spoken = {failure.rank for failure in failures} | killed
    silent = [rank for rank, each in enumerate(processes) if _failed(each, rank, folder) and rank not in spoken]
    silent = [rank for rank in silent if not (failures and processes[rank].returncode == -signal.SIGABRT)]
    if mistakes or (failures and not silent):
        shown = (mistakes or failures)[0]
        print(shown.message, file=sys.stderr)
        return shown.status
    if silent:
        rank = min(silent, key=lambda rank: (rank not in first, rank))
        status = processes[rank].returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        print(
            f"dltrain: rank {rank} {how} before its work was done; checkpoints it had saved are whole", file=sys.stderr
        )
        return 128 - status if status < 0 else int(status) or 1
    return EXIT_STOPPED if stopped_in(folder) else 0
