"""What the first process of a container owes to those below it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dltrain.runtime import minding
from dltrain.runtime.minding import Minded

RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def handle(number, frame):
    if {heeds}:
        (folder / "saved").touch()
        os._exit(0)
signal.signal(signal.SIGTERM, handle)
(folder / "ready-0.part").write_text(str(os.getpid()))
(folder / "ready-0.part").rename(folder / "ready-0")
while True:
    time.sleep(0.05)
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minding, "LAST", 1.0)
    monkeypatch.setattr(minding, "UNREADY", 0.5)


def minded(folder: Path, code: str, grace: float = 30.0) -> Minded:
    return Minded([sys.executable, "-c", code, str(folder)], dict(os.environ), folder, grace)


def signalled_when(folder: Path, name: str) -> threading.Thread:
    def send() -> None:
        while not (folder / name).exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


def test_a_status_is_handed_on_and_orphans_are_ended_and_reaped(tmp_path: Path) -> None:
    before = {each.pid for each in children()}
    stubborn = "trap '' TERM; touch ready; sleep 60"
    shell = f"import subprocess, sys, time, os; subprocess.Popen(['sh', '-c', \"{stubborn}\"], cwd=sys.argv[1])\n"
    shell += "while not os.path.exists(sys.argv[1] + '/ready'): time.sleep(0.02)\nsys.exit(3)"
    assert minded(tmp_path, shell).run() == 3
    assert {each.pid for each in children()} <= before


def test_a_rank_that_listens_gets_the_signal_and_the_time_to_save(tmp_path: Path) -> None:
    sender = signalled_when(tmp_path, "ready-0")
    watched = minded(tmp_path, RANK.format(heeds=True))
    assert watched.run() == 0
    sender.join()
    assert (tmp_path / "saved").exists()
    assert (watched.signalled, watched.forced) == ("SIGTERM", False)


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    sender = signalled_when(tmp_path, "ready-0")
    watched = minded(tmp_path, RANK.format(heeds=False), grace=0.5)
    assert watched.run() == -signal.SIGKILL
    sender.join()
    assert watched.forced


def test_one_that_does_not_listen_yet_has_nothing_to_save(tmp_path: Path) -> None:
    sender = signalled_when(tmp_path, "begun")
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'begun').touch(); time.sleep(60)"
    watched = minded(tmp_path, code)
    assert watched.run() == -signal.SIGTERM
    sender.join()
    assert watched.forced
