"""What asks a run to stop beside signals: a file, a deadline, the end of the process above."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dltrain.config import Config, Length, Run, load_overrides
from dltrain.errors import UserError
from dltrain.runtime import stop
from dltrain.runtime.stop import STARTED, StopFlag


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "LOOK_EVERY", 0.0)


def test_nothing_asks_at_first() -> None:
    flag = StopFlag(Run(), generations=2)
    assert not flag.look(1e9)
    assert not flag


def test_a_file_asks(tmp_path: Path) -> None:
    flag = StopFlag(Run(stop_file=str(tmp_path / "stop")))
    assert not flag.look(0)
    (tmp_path / "stop").touch()
    assert flag.look(0)
    assert flag.reason == f"run.stop_file {tmp_path / 'stop'} is there"


def test_a_deadline_asks_so_early_that_a_save_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(deadline=Length.parse("1h"))
    monkeypatch.setenv(STARTED, str(time.time() - 3600 + 60))
    assert not StopFlag(run).look(30)
    assert StopFlag(run).look(56)
    monkeypatch.delenv(STARTED)
    assert not StopFlag(run).look(3000)  # counted from now


def test_a_deadline_is_given_in_hours() -> None:
    with pytest.raises(UserError, match=r"run.deadline is 3st: give it in hours"):
        load_overrides(Config(), {"run.deadline": "3st"})


@pytest.mark.parametrize("generations", [*(pytest.param(few, marks=pytest.mark.slow) for few in (0, 1)), 2])
def test_a_process_whose_parents_end_is_told_if_it_asked(generations: int, tmp_path: Path) -> None:
    code = (
        "import sys, time; from dltrain.runtime import stop; from dltrain.config import Run; stop.LOOK_EVERY = 0.0\n"
        f"flag = stop.StopFlag(Run(), {generations}); print('ready', flush=True); until = time.monotonic() + 3\n"
        "while not flag.look(0) and time.monotonic() < until: time.sleep(0.02)\n"
        f"open({str(tmp_path / 'said')!r}, 'w').write(flag.reason or 'nothing')"
    )
    # the outer shell goes away, the inner one stays
    inner = f'"{sys.executable}" -c "{code}"; true'
    script = f"({inner}) & sleep 1.5"
    subprocess.run(["sh", "-c", script], check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    until = time.monotonic() + 10
    while not (tmp_path / "said").is_file() or not (tmp_path / "said").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    expected = "the process that started it has ended" if generations == 2 else "nothing"
    assert (tmp_path / "said").read_text() == expected
