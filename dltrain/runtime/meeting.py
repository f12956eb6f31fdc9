"""How the hosts of a job come together: names that must be known, and the words for torchrun's agent on each.

wait_for(["algo-1", "algo-2"], seconds=600)
command = agent(report, nproc=8, hosts=2, head="algo-1:7777", address="algo-2", job="dltrain")
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dltrain.errors import UserError

PORT = 7777
"""Where the first host listens for the others, as in SageMaker's own containers."""

RANK = ("--no-python", sys.executable, "-u", "-P", "-m", "dltrain.runtime.rank")
"""What a rank is for torchrun: the module that runs the recipe. Of the working folder nothing is imported before."""

WAIT = "DLTRAIN_HOSTS_TIMEOUT"
"""Variable: seconds that hosts have to come, 600 if it is not set."""


PORT_SAID = "DLTRAIN_PORT"
"""Variable: another port than that, where hosts share one network."""


def port() -> int:
    """Where the first host listens."""
    said = os.environ.get(PORT_SAID) or str(PORT)
    if not (said.isdecimal() and 0 < int(said) < 65536):
        raise UserError(f"{PORT_SAID} is {said!r}; give a port, 1 to 65535")
    return int(said)


def patience() -> float:
    """Seconds that hosts have to come."""
    said = os.environ.get(WAIT) or "600"
    try:
        return float(said)
    except ValueError:
        raise UserError(f"{WAIT} is {said!r}; give a number of seconds") from None


def wait_for(hosts: Sequence[str], seconds: float) -> None:
    """Until the names of these hosts are known; they may start later, and their names come with them. Raises
    :class:`UserError` naming those that have not come."""
    until, pause = time.monotonic() + seconds, 0.2
    left = list(hosts)
    while left := [host for host in left if not _is_known(host)]:
        if time.monotonic() > until:
            raise UserError(
                f"after {seconds:g} s {', '.join(left)} of {len(hosts)} hosts are not found by name: have they "
                "started? Look, or start the job again"
            )
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _is_known(host: str) -> bool:
    return bool(addresses(host))


def addresses(host: str) -> set[str]:
    """Of a host by name; none where the name is not known."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def agent(report: Path, nproc: int, hosts: int, head: str, address: str, job: str) -> list[str]:
    """torchrun's own words, to which a recipe and its words are added: all hosts meet at ``head`` (host:port), which is
    the one of that ``address``."""
    words = [sys.executable, "-P", "-m", "dltrain.runtime.elastic", str(report), f"--nproc-per-node={nproc}"]
    words.append(f"--log-dir={report.parent / 'agent'}")  # whose own folder it would leave behind
    if hosts == 1:
        return [*words, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *RANK]  # a free port
    is_head, wait = int(head.rpartition(":")[0] == address), int(patience())
    return [
        *words,
        f"--nnodes={hosts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}",
        f"--rdzv-id={job}",
        f"--rdzv-conf=is_host={is_head},join_timeout={wait},read_timeout={wait}",
        f"--local-addr={address}",
        *RANK,
    ]
