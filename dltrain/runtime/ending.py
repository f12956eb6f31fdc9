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

_PEERS = re.compile(
    r"closed by (remote )?peer|reset by peer|recvBytes|recvValue|broken pipe|NCCL.*(remote|abort)|"
    r"ncclRemoteError|connectFullMesh|DistNetworkError|no longer available|Did the remote server|first host is gone",
    re.IGNORECASE,
)
"""What errors say of a rank whose peers are gone."""

_OF_TORCH = re.compile(r"(\w+\.)*(RuntimeError|Dist\w*Error|the first host is gone)")
"""Begins those: a connection to a store breaks by other words."""


@dataclass(frozen=True)
class Ending:
    """``status`` is the host's exit status; ``told`` a sentence for the log; ``failure`` the one to blame, if any."""

    status: int
    told: str = ""
    failure: Failure | None = None


def is_of_peers(failure: Failure) -> bool:
    """Whether a rank failed for others were gone: then they are to blame."""
    of_torch = failure.status != EXIT_USER_ERROR and _OF_TORCH.match(failure.error)
    return bool(of_torch and _PEERS.search(failure.said))


def ending_of(minded: Minded, status: int, words: Path, report: Path, apart: str) -> Ending:
    """What happened, where the agent ended with ``status``; ``apart`` says which hosts should have met."""
    stop, left = stopped_in(words), running_in(words)
    failures = _failures(minded, words, report, apart)
    own = [failure for failure in failures if not is_of_peers(failure)]
    if stop is not None and not own:  # all ranks have saved it, whatever became of them then
        why = stop["reason"] or minded.signalled or "another host was asked to"
        if status < 0 and not minded.signalled:
            why = f"{_agent_ended(status)}, mostly because the host's memory was used up"
        again = "start it again with the same checkpoints to go on"
        return Ending(EXIT_STOPPED, f"stopped at step {stop['step']} and saved ({why}); {again}")
    if own or (failures and not minded.signalled):
        first = min(own or failures, key=lambda each: (each.status != EXIT_USER_ERROR, each.time))
        return Ending(first.status, first.message, first)
    if minded.signalled and (status or left):
        return Ending(EXIT_INTERRUPTED, f"{minded.signalled} came and {_unsaved(minded, words)}")
    if left and status == 0:
        first = _dead(min(left), 0)
        return Ending(first.status, first.message, first)
    if status < 0:
        how = _agent_ended(status)
        first = Failure(0, f"dltrain: {how}; checkpoints that ranks had saved are whole", 128 - status, how)
        return Ending(first.status, first.message, first)
    return Ending(status)


def _agent_ended(status: int) -> str:
    return f"torchrun's agent was ended by {signal.Signals(-status).name}"


def _failures(minded: Minded, words: Path, report: Path, apart: str) -> list[Failure]:
    """Without those that follow from a signal."""
    told = [each for each in failures_in(words) if not (minded.signalled and each.status == EXIT_INTERRUPTED)]
    return told if minded.forced else told + _silent(words, report, apart)


def _unsaved(minded: Minded, words: Path) -> str:
    if not ready_in(words):
        return "there was nothing to save yet"
    late = "ranks were not done in time" if minded.forced and running_in(words) else "nothing was saved at it"
    return f"{late}: the last committed checkpoint counts"


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
