"""Word from the ranks of a host to whoever started them, left as files in a folder. Imports no torch.

A rank says when it is at work and when no longer, when it listens to signals, why it failed, and why it stopped: an
exit status alone says little, and torchrun makes 1 of every one that is not 0.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dltrain.runtime.parent import stop_with_parent

FAILURES = "DLTRAIN_FAILURES"
"""Variable that names the folder."""

_NOT_OWN = ("site-packages", "/lib/python", "<frozen", "dltrain/runtime/rank.py")
"""In names of files whose lines say nothing of a fault."""

FRAMES = 3
"""Last lines of code that a failure names."""


@dataclass(frozen=True)
class Failure:
    """Why a rank failed: ``message`` is what a log shows, ``error`` one line, ``frames`` where ("file.py:12 in f")."""

    rank: int
    message: str
    status: int
    error: str = ""
    frames: tuple[str, ...] = ()
    step: int = 0
    host: str = ""
    time: float = 0.0

    @property
    def said(self) -> str:
        """What the error says, without the lines of code in its traceback: those are no part of it."""
        lines = [line for line in self.message.splitlines() if not line.startswith("  ")]
        return "\n".join([self.error, *lines])

    @classmethod
    def of(cls, error: BaseException, rank: int, message: str, status: int) -> Failure:
        """Of an exception that is being handled."""
        first = str(error).strip().splitlines()
        line = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
        step = int(getattr(error, "dltrain_step", 0))
        return cls(rank, message, status, line, _frames(error), step, os.uname().nodename, time.time())


def report_failure(failure: Failure) -> bool:
    """Returns whether there is somebody who will show it."""
    return _write(f"rank-{failure.rank}.json", asdict(failure))


def has_failed(rank: int) -> bool:
    """Whether this rank has told of a failure already."""
    folder = os.environ.get(FAILURES)
    return folder is not None and Path(folder, f"rank-{rank}.json").exists()


def failures_in(folder: Path) -> list[Failure]:
    """The first one first."""
    found = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    made = [Failure(**{**each, "frames": tuple(each["frames"])}) for each in found]
    return sorted(made, key=lambda failure: failure.time)


def report_running(rank: int, running: bool) -> None:
    """Tell that this rank is at work, or no longer: one that ends in between has failed, whatever its status says."""
    folder = os.environ.get(FAILURES)
    if folder is None:
        return
    mark = Path(folder, f"running-{rank}")
    mark.touch() if running else mark.unlink(missing_ok=True)


def running_in(folder: Path) -> set[int]:
    """Ranks that are at work, or died at it."""
    return {int(mark.name.removeprefix("running-")) for mark in folder.glob("running-*")}


def report_ready(rank: int) -> None:
    """Tell that this rank listens to signals; before, it has nothing to save and is simply ended."""
    if _write(f"ready-{rank}", os.getpid()):
        stop_with_parent()  # should the launcher be killed, its ranks save and stop


def ready_in(folder: Path) -> dict[int, int]:
    """Process by rank, of those that listen to signals."""
    marks = {int(mark.name.removeprefix("ready-")): mark for mark in folder.glob("ready-*")}
    return {rank: int(mark.read_text()) for rank, mark in marks.items()}


def report_stopped(rank: int, reason: str, step: int) -> bool:
    """Tell that this rank was asked to stop and has saved; returns whether there is somebody who makes a status of
    it."""
    return _write(f"stopped-{rank}.json", {"reason": reason, "step": step})


def stopped_in(folder: Path) -> dict[str, object] | None:
    """``reason`` and ``step`` of the stop, where there was one: that of the rank that knows why."""
    found: list[dict[str, object]] = [json.loads(file.read_text()) for file in sorted(folder.glob("stopped-*.json"))]
    return max(found, key=lambda each: bool(each["reason"])) if found else None


def is_of_words(error: SystemExit) -> bool:
    """Whether argparse ends a program: for help, or after words that it does not know. It has told why."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).name == "argparse.py"


def _write(name: str, value: Mapping[str, object] | int) -> bool:
    """Whole or not at all, for it may be read at any moment."""
    folder = os.environ.get(FAILURES)
    if folder is None:
        return False
    part = Path(folder, f".{name}.{os.getpid()}")
    part.write_text(json.dumps(value))
    part.rename(Path(folder, name))
    return True


def _frames(error: BaseException) -> tuple[str, ...]:
    """The last lines of the user's code, and the last outside installed packages; of all, where there are none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _NOT_OWN)] or frames
    users = [frame for frame in own if not _is_ours(Path(frame.filename))]
    shown = [frame for frame in own if frame in users[1 - FRAMES :] or frame is own[-1]] if users else own
    return tuple(f"{Path(each.filename).name}:{each.lineno} in {each.name}" for each in shown[-FRAMES:])


def _is_ours(file: Path) -> bool:
    package = Path(__file__).parents[1]
    return file.is_relative_to(package) and not file.is_relative_to(package / "recipes")
