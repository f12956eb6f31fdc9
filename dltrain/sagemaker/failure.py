"""The failure file: of what is in it SageMaker shows the first 1,024 characters, and nothing else of a failed job.

    write_failure(folders, failure, host)

It begins with which rank failed where and at what step, then the error, what to do about it, and the last lines of
code. Whoever writes first has the word; the whole of it goes to ``failure-<host>-rank-<rank>.log`` in the job's output.

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-signal-success-failure.html
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from dltrain.errors import EXIT_USER_ERROR
from dltrain.runtime.ending import is_of_peers
from dltrain.runtime.meeting import addresses
from dltrain.runtime.word import Failure
from dltrain.sagemaker.folders import Folders

MOST = 1024
"""Characters that SageMaker shows."""

NAME = "failure"

HINTS: tuple[tuple[str, str], ...] = (
    (r"\(rendezvous\)",
     "Not all hosts came: look whether each has started, and whether they reach each other's ports."),
    (r"CUDA out of memory|OutOfMemoryError",
     "Take a smaller parallel.micro_batch (auto measures it), parallel.activation_checkpointing, or more shards "
     "(parallel.dp_shard)."),
    (r"No space left on device|ENOSPC",
     "The disk is full: ask for a larger volume, keep fewer checkpoints (checkpoint.keep), or switch data.cache off."),
    (r"bus error|SIGBUS|/dev/shm|\bshm\b|shm_open",
     "Shared memory is too small for loader processes: set data.workers 0, or ask for a larger instance."),
    (r"ModuleNotFoundError|ImportError",
     "Name the package in a requirements.txt beside the recipe, or put it into the image."),
    (r"AccessDenied|Forbidden|(HTTP|status|code)\D{0,12}403\b|\(403\)|NoCredentials|Unable to locate credentials",
     "The job's role lacks a permission for that address: s3:GetObject and s3:ListBucket to read, s3:PutObject to "
     "write, and kms:Decrypt for its key."),
    (r"EndpointConnectionError|ConnectTimeout|Could not connect to the endpoint|Name or service not known|"
     r"Temporary failure in name resolution",
     "The address cannot be reached: in a VPC without a NAT there must be an endpoint for S3, and with network "
     "isolation there is no network at all."),
    (r"Timed out waiting|collective operation timeout|Watchdog caught|timed out after \d+ms",
     "A rank waited for another that did not come: look in the logs for the one that is behind, or raise "
     "parallel.timeout."),
    (r"SIGKILL",
     "Mostly the host's memory was used up: fewer data.workers, a smaller data.prefetch or batch, or an instance with "
     "more memory."),
    (r"SIGSEGV|SIGABRT|SIGFPE|SIGILL",
     "A library crashed: its last lines in the log say where; other versions of torch, the driver or NCCL may not."),
)  # fmt: skip
"""What to do about an error that an expression is found in, the first one that fits."""

OF_PEERS = "Another rank or host ended first: its log says why."
"""Stands in the failure file of a host that is not to blame."""


_ADDRESS = re.compile(r"[0-9A-Fa-f.:]*[0-9A-Fa-f](?=[\]<])")
"""Of a peer: gloo writes ``[10.0.0.2]:4711``, NCCL ``10.0.0.2<4711>``."""


def reason(failure: Failure, host: str, hosts: Sequence[str] = ()) -> str:
    """At most :data:`MOST` characters for somebody who sees nothing else; ``hosts`` are those of the job."""
    hint = _hint(failure)
    if failure.status == EXIT_USER_ERROR:
        said = failure.message.removeprefix("dltrain: error: ")
        return _sentence(_cut(said, MOST - len(hint) - 2)) + f" {hint}" if hint else _cut(said, MOST)
    step = f", step {failure.step}" if failure.step else ""
    where = f"rank {failure.rank} on {host}{step}: "
    rest = " ".join(filter(None, (_of_peer(failure, host, hosts), hint, _code(failure))))
    error = _cut(failure.error or failure.message, MOST - len(where) - len(rest) - 2)
    return f"{where}{_sentence(error)} {rest}" if rest else where + error


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "...")) else f"{text}."


def write_failure(folders: Folders, failure: Failure, host: str, hosts: Sequence[str] = ()) -> bool:
    """Write both files, as far as the disk takes them; returns whether this was the first to fail."""
    first = write_reason(folders, reason(failure, host, hosts))  # which is more, where the disk is full
    log = folders.output_data / f"failure-{host}-rank-{failure.rank}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(failure.message + "\n")
    except OSError as error:
        print(f"dltrain: {log} cannot be written: {error}", file=sys.stderr)
    return first


def write_reason(folders: Folders, text: str) -> bool:
    """The failure file alone, unless there is one."""
    try:
        folders.output.mkdir(parents=True, exist_ok=True)
        with (folders.output / NAME).open("x") as file:
            file.write(_cut(text, MOST))
    except FileExistsError:
        return False
    except OSError as error:
        print(f"dltrain: the failure file cannot be written: {error}", file=sys.stderr)
    return True


def _hint(failure: Failure) -> str:
    if failure.error.startswith("SystemExit"):
        return ""  # what stands there is the user's own
    for text in (failure.error, failure.said):
        for expression, hint in HINTS:
            if re.search(expression, text, re.IGNORECASE):
                return hint
    return OF_PEERS if is_of_peers(failure) else ""


def _of_peer(failure: Failure, host: str, hosts: Sequence[str]) -> str:
    """Which other host is gone, where the error has its address."""
    if not is_of_peers(failure):
        return ""
    said = {each.removeprefix("::ffff:") for each in _ADDRESS.findall(failure.said)}
    gone = [each for each in hosts if each != host and said & {each, *addresses(each)}]
    return f"It was connected to {', '.join(gone)}." if gone else ""


def _code(failure: Failure) -> str:
    return f"At {' < '.join(reversed(failure.frames))}." if failure.frames else ""


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: max(0, most - 4)] + " ..."
