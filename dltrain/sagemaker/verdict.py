"""What became of a host's ranks, told in the log, in the failure file and by the exit status."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from dltrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from dltrain.runtime.word import Failure, failures_in, running_in, stopped_in
from dltrain.sagemaker.failure import is_of_peers, write_failure, write_reason
from dltrain.sagemaker.minding import Minded
from dltrain.sagemaker.training_job import TrainingJob


def verdict(job: TrainingJob, minded: Minded, status: int, words: Path, report: Path) -> int:
    """Say what happened, in the log and in the failure file; returns the exit status."""
    stop = stopped_in(words)
    failures = failures_in(words) + _silent(job, words, report)
    if stop is not None and not minded.forced and not failures:
        why = stop["reason"] or minded.signalled or "another host was asked to"
        told = f"stopped at step {stop['step']} and saved ({why}); start it again with the same checkpoints to go on"
        print(f"dltrain: {told}", file=sys.stderr, flush=True)
        write_reason(job.folders, told)
        return EXIT_STOPPED
    if minded.signalled and not (failures and failures[0].status == EXIT_USER_ERROR):
        told = f"{minded.signalled} came and " + (
            "ranks were not done in time: the last committed checkpoint counts"
            if minded.forced and running_in(words)
            else "there was nothing to save yet"
        )
        print(f"dltrain: {told}", file=sys.stderr, flush=True)
        write_reason(job.folders, told)
        return EXIT_INTERRUPTED
    if failures:
        first = min(failures, key=lambda each: (each.status != EXIT_USER_ERROR, is_of_peers(each), each.time))
        print(first.message, file=sys.stderr, flush=True)
        write_failure(job.folders, first, job.host)
        return first.status
    if status:
        write_reason(job.folders, f"the ranks of {job.host} could not be started (status {status}); the log says why")
    return 128 - status if status < 0 else status


def _silent(job: TrainingJob, words: Path, report: Path) -> list[Failure]:
    """Failures of which no rank has told: hosts that did not come, and ranks that ended without a word."""
    found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {"ranks": {}, "rendezvous": ""}
    if found["rendezvous"]:
        message = f"the {len(job.hosts)} hosts did not come together at {job.hosts[0]} (rendezvous)"
        return [Failure(0, f"dltrain: {message}: {found['rendezvous']}", 1, message, time=time.time())]
    spoken = {failure.rank for failure in failures_in(words)}
    ranks = {int(rank): int(status) for rank, status in found["ranks"].items()}
    dead = {rank: status for rank, status in ranks.items() if rank not in spoken and status != -signal.SIGTERM}
    return [_dead(rank, status) for rank, status in sorted(dead.items())]


def _dead(rank: int, status: int) -> Failure:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    message = f"dltrain: rank {rank} {how} before its work was done; checkpoints it had saved are whole"
    return Failure(rank, message, 128 - status if status < 0 else status or 1, how, time=0.0)
