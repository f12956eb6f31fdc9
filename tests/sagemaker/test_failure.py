"""The failure file: for each kind of error a sentence that somebody can act on, in what SageMaker shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dltrain.errors import UserError
from dltrain.runtime.ending import is_of_peers
from dltrain.runtime.word import Failure
from dltrain.sagemaker.failure import MOST, reason, write_failure
from dltrain.sagemaker.folders import Folders

KINDS = {
    "out of memory": ("OutOfMemoryError: CUDA out of memory. Tried to allocate", "smaller parallel.micro_batch"),
    "full disk": ("OSError: [Errno 28] No space left on device", "larger volume"),
    "shared memory": ("RuntimeError: DataLoader worker is killed by signal: Bus error", "workers 0"),
    "package": ("ModuleNotFoundError: No module named 'timm'", "requirements.txt"),
    "permission": ("ClientError: An error occurred (AccessDenied) when calling GetObject", "s3:GetObject"),
    "no route": ("EndpointConnectionError: Could not connect to the endpoint URL", "endpoint for S3"),
    "collective": ("DistBackendError: Watchdog caught collective operation timeout", "parallel.timeout"),
    "killed": ("was ended by SIGKILL", "host's memory"),
    "crashed": ("was ended by SIGSEGV", "library crashed"),
    "peers": ("RuntimeError: Connection closed by peer [10.0.0.2]:4711", "ended first"),
    "rendezvous": ("the 2 hosts did not come together at algo-1 (rendezvous)", "each has started"),
}  # fmt: skip


def failed(error: str, message: str = "") -> Failure:
    return Failure(3, message or error, 1, error, ("recipe.py:12 in loss", "recipe.py:40 in scale"), 120)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_says_what_to_do(kind: str) -> None:
    error, advice = KINDS[kind]
    told = reason(failed(error), "algo-2")
    assert told.startswith(f"rank 3 on algo-2, step 120: {error}. ")
    assert advice in told
    assert told.endswith("At recipe.py:40 in scale < recipe.py:12 in loss.")
    assert is_of_peers(failed(error)) == (kind == "peers")


def test_a_mistake_of_the_users_is_its_sentence_alone() -> None:
    mistake = Failure(0, "dltrain: error: there is no setting 'a.b'; did you mean 'a.c'?", 2, "UserError: ...", ("x",))
    assert reason(mistake, "algo-1") == "there is no setting 'a.b'; did you mean 'a.c'?"


TRACED = """Traceback (most recent call last):
  File "/opt/ml/code/mine.py", line 403, in hashmap_shm
    raise ValueError(SIGKILL)
  File "/usr/lib/python3.11/site-packages/torch/distributed/rendezvous.py", line 12, in (rendezvous)
"""


@pytest.mark.parametrize(
    "error",
    [
        "IndexError: index 403 is out of bounds",
        "ValueError: no hashmap for shmuel",
        "ConnectionResetError: [Errno 104] Connection reset by peer",  # of a store, as boto3 has it
        "UserError: s3://bucket/a: Connection was closed by peer; tried 5 times",
        "RuntimeError: NCCL error: unhandled system error",
        "SystemExit: AccessDenied, says my script",
    ],
)
def test_a_hint_is_about_the_error_and_not_about_lines_of_code(error: str) -> None:
    told = reason(failed(error, TRACED + error), "algo-1")
    assert told == f"rank 3 on algo-1, step 120: {error}. At recipe.py:40 in scale < recipe.py:12 in loss."
    assert not is_of_peers(failed(error, TRACED + error))


def test_what_an_error_says_in_its_later_lines_counts() -> None:
    nccl = "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"
    lost = failed(nccl, f"{TRACED}{nccl}\nLast error:\nsocketProgress: Connection closed by remote peer 10.0.0.2<4711>")
    assert is_of_peers(lost)
    assert "Another rank or host ended first" in reason(lost, "algo-1")


@pytest.mark.parametrize("address", ["[127.0.0.1]:4711", "127.0.0.1<4711>", "::ffff:127.0.0.1<4711>"])
def test_a_rank_whose_peers_are_gone_names_the_host_of_theirs(address: str) -> None:
    lost = failed(f"RuntimeError: Connection closed by peer {address}")
    assert "It was connected to localhost. Another rank or host ended first" in reason(lost, "a", ("a", "localhost"))
    assert "connected to" not in reason(lost, "localhost", ("a", "localhost"))  # which is itself
    assert "connected to" not in reason(lost, "a", ("a", "b.invalid"))


def test_what_is_long_is_cut_and_keeps_advice_and_code() -> None:
    told = reason(failed("CUDA out of memory " + "x" * 5000), "algo-1")
    assert MOST - 1 <= len(told) <= MOST
    assert "smaller parallel.micro_batch" in told
    assert told.endswith("in loss.")


def test_the_first_to_write_has_the_word_and_everything_is_kept(tmp_path: Path) -> None:
    folders = Folders.read({"SAGEMAKER_BASE_DIR": str(tmp_path)})
    assert write_failure(folders, failed("first", "Traceback ... first"), "algo-1")
    assert not write_failure(folders, failed("second"), "algo-2")
    assert "first" in (folders.output / "failure").read_text()
    assert (folders.output_data / "failure-algo-1-rank-3.log").read_text() == "Traceback ... first\n"
    assert (folders.output_data / "failure-algo-2-rank-3.log").is_file()


def test_a_failure_says_where_in_the_users_code() -> None:
    def loss() -> None:
        raise UserError("no\nsecond line")

    try:
        loss()
    except UserError as error:
        failure = Failure.of(error, 1, "m", 2)
    assert failure.error == "UserError: no"
    assert failure.frames[-1].startswith("test_failure.py:")
    assert failure.frames[-1].endswith(" in loss")
