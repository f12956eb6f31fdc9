"""Minding a process tree as its first process does: signals handed on, orphans reaped, nothing left behind.

SageMaker and Kubernetes send SIGTERM to process 1 of a container and SIGKILL some time later. A shell in that place
hands nothing on. Here those ranks that listen get the signal, and have until ``grace`` to save; then everything is
ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from dltrain.runtime.word import ready_in

_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>

UNREADY = 5.0
"""Seconds after a signal until a job none of whose ranks listens yet is simply ended: it has nothing to save."""

LAST = 5.0
"""Seconds between the last request to end and the end by force."""

PAUSE = 0.05


class Minded:
    """A command whose ranks leave word in ``folder`` (:mod:`dltrain.runtime.word`).

    The process is given up to it: whatever children it has are reaped, and ended at the end; signals to stop are noted
    from then on and do nothing else.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], folder: Path, grace: float) -> None:
        self._command, self._variables, self._folder, self._grace = command, variables, folder, grace
        self.signalled = ""
        """The name of the signal that came, if one did."""
        self.forced = False
        """Whether ranks had to be ended before they were done."""
        self._since = 0.0
        self._told: set[int] = set()

    def run(self) -> int:
        """The command's exit status, negative after a signal; until then signals are handed on."""
        if sys.platform == "linux":  # not process 1, it gets the orphans of its own tree all the same
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):  # for good: one that comes at the end must not cut it short
            signal.signal(number, self._note)
        # a group of its own: a terminal's Ctrl-C reaches this process alone, which hands it on
        process = subprocess.Popen(self._command, env=dict(self._variables), process_group=0)
        while (status := self._reaped(process.pid)) is None:
            if self.signalled:
                self._hand_on(process.pid)
            time.sleep(PAUSE)
        process.returncode = status
        self._end_the_rest()
        return status

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signalled:
            self.signalled, self._since = signal.Signals(number).name, time.monotonic()

    def _reaped(self, wanted: int) -> int | None:
        """Take leave of all processes that have ended; the status of the wanted one, if it is among them."""
        status = None
        while True:
            try:
                ended, how = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status
            if not ended:
                return status
            if ended == wanted:
                status = os.waitstatus_to_exitcode(how)

    def _hand_on(self, process: int) -> None:
        """To each rank once, as soon as it listens; later to all that is left."""
        for rank, each in ready_in(self._folder).items():
            if rank not in self._told:
                self._told.add(rank)
                _send(each, signal.SIGTERM)
        waited = time.monotonic() - self._since
        if waited > self._grace + LAST:
            _send_all(signal.SIGKILL)
        elif waited > self._grace or (waited > UNREADY and not self._told):
            self.forced = True
            _send(process, signal.SIGTERM)

    def _end_the_rest(self) -> None:
        """Ranks and loader processes that outlived the command: they have become this process's children."""
        until = time.monotonic() + LAST
        _send_all(signal.SIGTERM)
        while _left():
            self._reaped(0)
            if time.monotonic() > until:
                _send_all(signal.SIGKILL)
            time.sleep(PAUSE)


def _send(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return  # it has ended meanwhile


def _send_all(number: int) -> None:
    for each in _left():
        _send(each.pid, number)


def _left() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)
