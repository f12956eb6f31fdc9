"""What the first process of a container owes to those below it; it is one of its own here, for it reaps whatever it
finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

MIND = """
import json, os, pathlib, sys, threading, time
import psutil
from dltrain.runtime import minding
minding.LAST, minding.UNREADY, minding.LINGER, minding.LINGER_STOPPED, minding.LOOK = 1.0, 0.5, 1.5, 0.3, 0.1
folder, code, grace, mark = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
watched = minding.Minded([sys.executable, "-c", code, str(folder)], dict(os.environ), folder, grace)
def signal_when():
    while not (folder / mark).exists():
        time.sleep(0.02)
    os.kill(os.getpid(), 15)
if mark:
    threading.Thread(target=signal_when).start()
status = watched.run()
left = len(psutil.Process().children(recursive=True))
print(json.dumps({"status": status, "signalled": watched.signalled, "forced": watched.forced, "left": left}))
"""

RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def handle(number, frame):
    if {heeds}:
        (folder / "saved").touch()
        os._exit(0)
signal.signal(signal.SIGTERM, handle)
(folder / "part").write_text(str(os.getpid()))
(folder / "part").rename(folder / "ready-0")
while True:
    time.sleep(0.05)
"""


def minded(folder: Path, code: str, grace: float = 30.0, mark: str = "") -> dict[str, Any]:
    """How the command ended that runs ``code``, signalled when the file ``mark`` is there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MIND, str(folder), code, str(grace), mark]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_status_is_handed_on_and_orphans_are_ended_and_reaped(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; touch ready; sleep 60"
    code = f"import subprocess, sys, time, os; subprocess.Popen(['sh', '-c', \"{stubborn}\"], cwd=sys.argv[1])\n"
    code += "while not os.path.exists(sys.argv[1] + '/ready'): time.sleep(0.02)\nsys.exit(3)"
    assert minded(tmp_path, code) == {"status": 3, "signalled": "", "forced": False, "left": 0}


def test_a_rank_that_listens_gets_the_signal_and_the_time_to_save(tmp_path: Path) -> None:
    found = minded(tmp_path, RANK.format(heeds=True), mark="ready-0")
    assert found == {"status": 0, "signalled": "SIGTERM", "forced": False, "left": 0}
    assert (tmp_path / "saved").exists()


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found = minded(tmp_path, RANK.format(heeds=False), 0.5, mark="ready-0")
    assert found == {"status": -signal.SIGKILL, "signalled": "SIGTERM", "forced": True, "left": 0}


def test_one_that_does_not_listen_yet_has_nothing_to_save(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'begun').touch(); time.sleep(60)"
    found = minded(tmp_path, code, mark="begun")
    assert found == {"status": -signal.SIGTERM, "signalled": "SIGTERM", "forced": True, "left": 0}


AGENT = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
(folder / "ready-0").write_text(str(rank.pid))
rank.wait()
{running}
time.sleep(60)
"""


def test_a_command_that_stays_when_its_ranks_have_left_is_let_go(tmp_path: Path) -> None:
    found = minded(tmp_path, AGENT.format(running=""))
    assert found == {"status": 0, "signalled": "", "forced": False, "left": 0}


def test_after_a_signal_it_is_let_go_sooner_than_by_force(tmp_path: Path) -> None:
    began = time.monotonic()
    found = minded(tmp_path, AGENT.format(running=""), grace=40.0, mark="ready-0")
    assert found == {"status": 0, "signalled": "SIGTERM", "forced": False, "left": 0}
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_one_whose_ranks_died_at_work_ends_by_itself(tmp_path: Path) -> None:
    code = AGENT.format(running="(folder / 'running-0').touch(); time.sleep(3); sys.exit(4)")
    assert minded(tmp_path, code)["status"] == 4
