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

from dltrain.runtime.word import ready_in, running_in, stopped_in

_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>

UNREADY = 5.0
"""Seconds after a signal until a job none of whose ranks listens yet is simply ended: it has nothing to save."""

LAST = 5.0
"""Seconds between the last request to end and the end by force."""

LINGER, LINGER_STOPPED = 120.0, 10.0
"""Seconds that a command may stay when all of its ranks have left: torchrun's agent waits five minutes for those of a
host that is gone. Less where they were asked to stop."""

PAUSE, LOOK = 0.05, 1.0
"""Seconds between two rounds, and between looks at what there is on the machine."""


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
        self._ended: set[int] = set()
        self._next = self._idle = 0.0

    def run(self) -> int:
        """The command's exit status, negative after a signal, 0 where it had to be ended though its ranks had all left;
        until then signals are handed on."""
        if sys.platform == "linux":  # not process 1, it gets the orphans of its own tree all the same
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT):  # for good: one that comes at the end must not cut it short
            signal.signal(number, self._note)
        # a group of its own: a terminal's Ctrl-C reaches this process alone, which hands it on
        process = subprocess.Popen(self._command, env=dict(self._variables), process_group=0)
        while (status := self._reaped(process.pid)) is None:
            if self.signalled:
                self._hand_on(process.pid)
            self._let_go(process.pid)
            time.sleep(PAUSE)
        process.returncode = status
        self._end_the_rest()
        return 0 if self._idle and process.pid in self._ended else status

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
        new = {rank: each for rank, each in ready_in(self._folder).items() if rank not in self._told}
        here = {each.pid for each in _left()} if new else set()
        for rank, each in new.items():
            self._told.add(rank)
            if each in here:  # and is not another process by now
                _send(each, signal.SIGTERM)
        waited = time.monotonic() - self._since
        if waited > self._grace + LAST:
            _send_all(signal.SIGKILL)
        elif waited > self._grace or (waited > UNREADY and not self._told):
            self.forced = True
            self._end(process)

    def _end(self, process: int) -> None:
        """Once: a second signal would break off what it does about the first."""
        if process not in self._ended:
            self._ended.add(process)
            _send(process, signal.SIGTERM)

    def _let_go(self, process: int) -> None:
        """End a command that stays though all ranks that there were have left."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK
        ready = ready_in(self._folder)
        if not ready or running_in(self._folder) or {*ready.values()} & {each.pid for each in _left()}:
            self._idle = 0.0
            return
        self._idle = self._idle or now
        stopped = self.signalled or stopped_in(self._folder) is not None
        over = now - self._idle - (LINGER_STOPPED if stopped else LINGER)
        if over > 0:
            self._end(process)
        if over > LAST:
            _send_all(signal.SIGKILL)

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
