"""What became of a host's ranks, from the words they left, the signals that came and the report of torchrun's agent.

    ending = ending_of(minded, status, words, report, "the 2 hosts did not come together at algo-1")

A stop that was saved counts as such; else the first failure to blame does, not the collapse of its peers.
"""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER_ERROR
from dltrain.runtime.minding import Minded
from dltrain.runtime.word import Failure, failures_in, ready_in, running_in, stopped_in

PEERS = re.compile(
    r"closed by peer|reset by peer|recvBytes|broken pipe|NCCL.*(remote|abort|unhandled)|ncclRemoteError|"
    r"connectFullMesh|DistNetworkError|no longer available|first host is gone",
    re.IGNORECASE,
)
"""Errors of a rank whose peers are gone."""


@dataclass(frozen=True)
class Ending:
    """``status`` is the host's exit status; ``told`` a sentence for the log; ``failure`` the one to blame, if any."""

    status: int
    told: str = ""
    failure: Failure | None = None


def is_of_peers(failure: Failure) -> bool:
    """Whether a rank failed for others were gone: then they are to blame."""
    return failure.status != EXIT_USER_ERROR and bool(PEERS.search(failure.error) or PEERS.search(failure.message))


def ending_of(minded: Minded, status: int, words: Path, report: Path, apart: str) -> Ending:
    """What happened, where the agent ended with ``status``; ``apart`` says which hosts should have met."""
    stop = stopped_in(words)
    failures = failures_in(words) + _silent(words, report, apart)
    left = running_in(words)
    if status == 0 and stop is None and not failures:
        if not left:
            return Ending(0)  # whatever signal came while it was ending
        failures = [_dead(min(left), 0)]
    if stop is not None and not minded.forced and not failures:
        why = stop["reason"] or minded.signalled or "another host was asked to"
        again = "start it again with the same checkpoints to go on"
        return Ending(EXIT_STOPPED, f"stopped at step {stop['step']} and saved ({why}); {again}")
    if minded.signalled and not (failures and failures[0].status == EXIT_USER_ERROR):
        late = minded.forced and running_in(words)
        why = "ranks were not done in time: the last committed checkpoint counts" if late else _NOTHING
        return Ending(EXIT_INTERRUPTED, f"{minded.signalled} came and {why}")
    if failures:
        first = min(failures, key=lambda each: (each.status != EXIT_USER_ERROR, is_of_peers(each), each.time))
        return Ending(first.status, first.message, first)
    return Ending(128 - status if status < 0 else status)


_NOTHING = "there was nothing to save yet"


def _silent(words: Path, report: Path, apart: str) -> list[Failure]:
    """Failures of which no rank has told: hosts that did not come, and ranks that ended without a word."""
    found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {"ranks": {}, "rendezvous": ""}
    if found["rendezvous"]:
        message = "the first host is gone" if ready_in(words) else f"{apart} (rendezvous)"
        return [Failure(0, f"dltrain: {message}: {found['rendezvous']}", 1, message, time=time.time())]
    spoken = {failure.rank for failure in failures_in(words)}
    ranks = {int(rank): int(status) for rank, status in found["ranks"].items()}
    dead = {rank: status for rank, status in ranks.items() if rank not in spoken and status != -signal.SIGTERM}
    return [_dead(rank, status) for rank, status in sorted(dead.items())]


def _dead(rank: int, status: int) -> Failure:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    message = f"dltrain: rank {rank} {how} before its work was done; checkpoints it had saved are whole"
    return Failure(rank, message, 128 - status if status < 0 else status or 1, how, time=0.0)
