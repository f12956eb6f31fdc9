"""``run_ranks``: results by rank, the first failing rank's traceback, a time limit; and the launcher's verdicts."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.runtime.launch import launch
from dltrain.testing.ranks import RankError, run_ranks


def add(rank: int, start: float) -> float:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return total.item()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def hang(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def die(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def test_ranks_are_joined_and_give_results_in_order() -> None:
    assert run_ranks(add, 3, 10.0) == [33.0, 33.0, 33.0]


def test_the_first_failing_rank_is_shown_and_the_others_ended() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*fail_on_one.*the reason"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_rank_that_dies_or_hangs_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 died without a word"):
        run_ranks(die, 2)
    with pytest.raises(RankError, match=r"ranks \[0\] did not end in time"):
        run_ranks(hang, 2, seconds=6)


def test_the_launcher_sets_what_torchrun_sets_and_shares_out_threads(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')))"
    assert launch([sys.executable, "-c", code], 3) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 3 0 3", "1 3 1 3", "2 3 2 3"]


def test_the_launcher_ends_all_when_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)"
    began = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 3
    assert time.monotonic() - began < 20
    assert "rank 1 ended with status 3" in capfd.readouterr().err


RUNNING = "import os, sys, time; from dltrain.runtime.word import *; rank = int(os.environ['RANK'])"


@pytest.mark.slow
def test_a_rank_that_leaves_in_the_middle_has_failed_whatever_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    code = f"{RUNNING}; report_running(rank, True); os._exit(0) if rank == 1 else time.sleep(60)"
    began = time.monotonic()
    assert launch([sys.executable, "-c", code], 2) == 1
    assert time.monotonic() - began < 20
    assert "rank 1 ended with status 0 before its work was done" in capfd.readouterr().err
    code = f"{RUNNING}; report_running(rank, True); report_running(rank, False)"
    assert launch([sys.executable, "-c", code], 2) == 0


def test_the_first_death_is_told_not_that_of_a_peer_which_followed(capfd: pytest.CaptureFixture[str]) -> None:
    code = f"{RUNNING}; rank == 1 or time.sleep(0.5); os.kill(os.getpid(), 9 if rank == 1 else 6)"
    assert launch([sys.executable, "-c", code], 2) == 128 + 9
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    code = f"{RUNNING}; rank == 0 and os.abort(); report_failure(Failure(1, 'the reason', 1)); time.sleep(0.5)"
    code += "; sys.exit(1)"
    assert launch([sys.executable, "-c", code], 2) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "the reason"


def test_the_environment_is_read_and_checked() -> None:
    two_nodes = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    here = Environment.read(two_nodes)
    assert (here.node, here.nodes, here.is_main) == (1, 2, False)
    assert Environment.read({}) == Environment(0, 1, 0, 1)
    for bad, message in (
        ({"RANK": "x"}, "whole numbers"),
        ({"RANK": "0", "GROUP_WORLD_SIZE": "x"}, "whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "must lie in the world"),
    ):
        with pytest.raises(UserError, match=message):
            Environment.read(bad)
    for local in ("1", "3"):  # hosts of 1 rank and of 3: each of them refuses
        with pytest.raises(UserError, match=f"this host runs {local} rank.* every host must run the"):
            Environment.read({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": local, "GROUP_WORLD_SIZE": "2"})
    assert Environment.read({**two_nodes, "GROUP_WORLD_SIZE": "2"}) == here
