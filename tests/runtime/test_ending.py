"""What became of a host's ranks, from what they left."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dltrain.runtime.ending import Ending, ending_of, is_of_peers
from dltrain.runtime.minding import Minded
from dltrain.runtime.word import Failure


def ending(words: Path, status: int, signalled: str = "", forced: bool = False) -> Ending:
    minded = cast(Minded, SimpleNamespace(signalled=signalled, forced=forced))
    return ending_of(minded, status, words, words / "report.json", "the hosts did not come together")


def test_a_job_that_is_done_has_ended_well_whatever_signal_came_meanwhile(tmp_path: Path) -> None:
    assert ending(tmp_path, 0) == ending(tmp_path, 0, "SIGTERM") == Ending(0)


def test_a_rank_that_left_in_the_middle_has_failed_with_status_0_too(tmp_path: Path) -> None:
    (tmp_path / "running-3").touch()
    found = ending(tmp_path, 0)
    assert found.status == 1
    assert "rank 3 ended with status 0 before its work was done" in found.told


def test_a_stop_that_was_saved_is_one(tmp_path: Path) -> None:
    told: dict[str, Any] = {"reason": "SIGTERM", "step": 7}
    (tmp_path / "stopped-0.json").write_text(json.dumps(told))
    found = ending(tmp_path, 0, "SIGTERM")
    assert (found.status, "stopped at step 7 and saved (SIGTERM)" in found.told) == (75, True)


def test_a_signal_before_there_was_anything_to_save_is_told_so(tmp_path: Path) -> None:
    found = ending(tmp_path, -15, "SIGTERM")
    assert (found.status, "nothing to save yet" in found.told) == (130, True)


def test_hosts_that_met_and_lost_their_first_have_not_failed_to_meet(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"ranks": {}, "rendezvous": "RendezvousConnectionError: lost"}))
    assert ending(tmp_path, 1).told.startswith("dltrain: the hosts did not come together (rendezvous): Rendezvous")
    (tmp_path / "ready-1").write_text("12")
    found = ending(tmp_path, 1)
    assert found.told.startswith("dltrain: the first host is gone: RendezvousConnectionError: lost")
    assert found.failure is not None
    assert is_of_peers(found.failure)


def left(words: Path, failure: Failure) -> None:
    (words / f"rank-{failure.rank}.json").write_text(json.dumps(asdict(failure)))


def test_a_save_that_fails_at_a_signal_is_the_failure(tmp_path: Path) -> None:
    (tmp_path / "ready-0").write_text("12")
    left(tmp_path, Failure(0, "the traceback", 1, "OSError: [Errno 28] No space left on device", time=2.0))
    left(tmp_path, Failure(1, "its traceback", 1, "RuntimeError: Connection closed by peer [10.0.0.2]:47", time=1.0))
    found = ending(tmp_path, 1, "SIGTERM")
    assert (found.status, found.told) == (1, "the traceback")


@pytest.mark.parametrize("forced", [False, True])
def test_what_all_have_saved_is_a_stop_whatever_comes_then(tmp_path: Path, forced: bool) -> None:
    (tmp_path / "stopped-0.json").write_text(json.dumps({"reason": "SIGTERM", "step": 7}))
    left(tmp_path, Failure(1, "its traceback", 1, "RuntimeError: Connection closed by peer [10.0.0.2]:47"))
    assert ending(tmp_path, -9, "SIGTERM", forced).status == 75
    left(tmp_path, Failure(0, "the traceback", 1, "ValueError: in a hook's last words"))
    assert ending(tmp_path, 1, "SIGTERM", forced).status == 1


def test_a_signal_that_found_hosts_gone_saved_nothing(tmp_path: Path) -> None:
    (tmp_path / "ready-0").write_text("12")
    left(tmp_path, Failure(0, "its traceback", 1, "RuntimeError: Connection closed by peer [10.0.0.2]:47"))
    found = ending(tmp_path, 1, "SIGTERM")
    assert (found.status, found.told) == (
        130, "SIGTERM came and nothing was saved at it: the last committed checkpoint counts")  # fmt: skip
    (tmp_path / "running-0").touch()
    assert "ranks were not done in time" in ending(tmp_path, -9, "SIGTERM", forced=True).told
    assert ending(tmp_path, 1).told == "its traceback"  # without a signal it is all that is known


def test_an_agent_that_is_killed_is_told(tmp_path: Path) -> None:
    found = ending(tmp_path, -9)
    assert found.status == 137
    assert found.told.startswith("dltrain: torchrun's agent was ended by SIGKILL; checkpoints")


def test_a_stop_because_the_agent_was_killed_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "stopped-0.json").write_text(json.dumps({"reason": "the process that started it has ended", "step": 7}))
    found = ending(tmp_path, -9)
    assert found.status == 75
    assert "torchrun's agent was ended by SIGKILL, mostly because the host's memory was used up" in found.told
