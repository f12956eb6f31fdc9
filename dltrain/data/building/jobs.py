"""Jobs on many shards, by several processes.

A job is small (a number, a range) and is sent to whichever process is free; what all jobs need goes to each process
once. Processes are spawned, so nothing of the parent's threads and connections is inherited; they end with it, however
it ends.

    results = run_jobs(verify_shard, range(len(manifest.shards)), workers=4, report=progress)
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, TypeVar

from dltrain.errors import UserError

J = TypeVar("J")
R = TypeVar("R")

Report = Callable[[int, int], None]
"""Told how many more samples and bytes are done."""

Work = Callable[[J, Report], R]
"""What is done for one job. With more than one worker it is pickled, so it is a function or an object of a class."""

_REPORT_SECONDS = 0.25
_DIED = "a worker process died, perhaps for want of memory; run the same command again, with fewer --workers"


class Watch(Protocol):
    """What is told of the progress of jobs."""

    def begin(self, jobs: int) -> None:
        """So many jobs are to be done."""
        ...

    def more(self, samples: int, size: int) -> None:
        """So many more samples and bytes are done."""
        ...

    def job_done(self) -> None: ...


class Unwatched:
    """Progress that nobody looks at."""

    def begin(self, jobs: int) -> None:
        """Nobody is told."""

    def more(self, samples: int, size: int) -> None:
        """Nobody is told."""

    def job_done(self) -> None:
        """Nobody is told."""


def refuse_workers(workers: int) -> None:
    """Raise :class:`UserError` for a number of processes that is none."""
    if workers < 1:
        raise UserError(f"--workers is {workers}; give 1 or more")


def run_jobs(work: Work[J, R], jobs: Sequence[J], workers: int = 1, watch: Watch | None = None) -> list[R]:
    """``work`` of every job, in the order of the jobs. Raises the first :class:`UserError` of any."""
    refuse_workers(workers)
    watch = watch or Unwatched()
    watch.begin(len(jobs))
    if min(workers, len(jobs)) > 1:
        return _run_parallel(work, jobs, min(workers, len(jobs)), watch)
    results = []
    for job in jobs:
        report = _Throttled(watch.more)
        results.append(work(job, report))
        report.flush()
        watch.job_done()
    return results


def _run_parallel(work: Work[J, R], jobs: Sequence[J], workers: int, watch: Watch) -> list[R]:
    results: dict[int, R] = {}
    waiting = list(range(len(jobs)))[::-1]
    at_work: dict[Connection, int] = {}
    with ExitStack() as stack:
        for _ in range(workers):
            connection = stack.enter_context(_Process(work)).connection
            at_work[connection] = waiting.pop()
            _send(connection, jobs[at_work[connection]])
        while at_work:
            ready = wait(list(at_work))
            for connection in [each for each in at_work if each in ready]:
                if not _receive(connection, at_work[connection], results, watch):
                    continue
                if waiting:
                    at_work[connection] = waiting.pop()
                    _send(connection, jobs[at_work[connection]])
                else:
                    del at_work[connection]
    return [results[place] for place in range(len(jobs))]


def _send(connection: Connection, job: Any) -> None:
    try:
        connection.send(job)
    except (BrokenPipeError, ConnectionResetError):
        raise UserError(_DIED) from None


def _receive(connection: Connection, job: int, results: dict[int, Any], watch: Watch) -> bool:
    """Take one message of a process; whether it has finished its job."""
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(_DIED) from None
    if kind == "more":
        watch.more(*content)
    elif kind == "mistake":
        raise UserError(content)
    elif kind == "fault":
        raise RuntimeError(f"in a worker process:\n{content}")
    else:
        results[job] = content
        watch.job_done()
    return kind == "done"


class _Process:
    """A process that serves jobs while the block lasts; it is ended with the block."""

    def __init__(self, work: Work[Any, Any]) -> None:
        context = get_context("spawn")
        self.connection, self._theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(self._theirs, work), daemon=True)

    def __enter__(self) -> _Process:
        resource_tracker.ensure_running()  # which would unblock signals if it were started by the process below
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a Ctrl-C now is for us alone
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._theirs.close()  # so that its end is heard of
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, work: Work[Any, Any]) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves by way of every block, which removes its files
    try:
        while True:
            _serve_job(connection, work, connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _serve_job(connection: Connection, work: Work[Any, Any], job: Any) -> None:
    report = _Throttled(lambda samples, size: connection.send(("more", (samples, size))))
    try:
        result = work(job, report)
        report.flush()
        connection.send(("done", result))
    except UserError as error:
        connection.send(("mistake", str(error)))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception:  # noqa: BLE001  told to the parent, which raises it
        connection.send(("fault", traceback.format_exc()))


class _Throttled:
    """A report that gathers what comes quickly, and passes it on a few times a second."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._samples = self._bytes = 0
        self._last = time.monotonic()

    def __call__(self, samples: int, size: int) -> None:
        self._samples += samples
        self._bytes += size
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._report(self._samples, self._bytes)
        self._samples = self._bytes = 0
        self._last = time.monotonic()
