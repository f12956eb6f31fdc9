"""Contestants side by side: one process each, and rounds in which each makes one pass in turn.

outcome = compete([ours, webdataset], rounds=5)
outcome.passes["webdataset"][0]["samples"]
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks.data_peers.job import Job

ROOT = Path(__file__).parent.parent.parent

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

PATIENCE = 180.0
"""Seconds that a pass may take, and a process to be ready."""


class ContestantError(Exception):
    """Why a contestant made no pass."""


@dataclass(frozen=True)
class Contestant:
    """``name`` as the result has it; ``reason``, where there is one, is why it cannot take part."""

    name: str
    python: Path
    job: Job
    variables: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@dataclass
class Outcome:
    """The answers of all passes by contestant, and the reasons of those that have none."""

    passes: dict[str, list[dict[str, Any]]]
    failed: dict[str, str]

    def drop(self, name: str, reason: str) -> None:
        """Take a contestant's passes out of the result."""
        self.passes.pop(name, None)
        self.failed[name] = reason


class Process:
    """One contestant's process."""

    def __init__(self, contestant: Contestant, scratch: Path) -> None:
        job = replace(contestant.job, scratch=str(scratch))
        path = f"{contestant.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        scratch.mkdir(parents=True, exist_ok=True)
        with (scratch / "log").open("w") as log:
            self._process = subprocess.Popen(
                [str(contestant.python), "-m", "benchmarks.data_peers.worker", job.to_json()],
                cwd=ROOT,
                env={**os.environ, **THREADS, **contestant.variables, "PATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._log = scratch / "log"

    def answer(self, patience: float = PATIENCE) -> dict[str, Any]:
        """Have it make one pass. Raises :class:`ContestantError` with its reason when it does not."""
        requests, answers = _pipes(self._process)
        try:
            print(file=requests, flush=True)
        except BrokenPipeError:
            raise ContestantError(self._last_words()) from None
        if not select.select([answers], [], [], patience)[0]:
            raise ContestantError(f"no answer within {patience:.0f} seconds")
        line = answers.readline()
        if not line:
            raise ContestantError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with status {self._process.wait()}"

    def close(self) -> None:
        """End it: by the end of its input, and by force where it does not listen."""
        for pipe in _pipes(self._process):
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def compete(contestants: Sequence[Contestant], rounds: int, fresh: bool = False) -> Outcome:
    """``rounds`` passes of everyone, one after the other; every second round goes backwards.

    A process warms up before its first pass and stays for all of them, or, where ``fresh``, makes a single one, cold.
    Who fails once takes no further part.
    """
    outcome = Outcome({}, {one.name: one.reason for one in contestants if one.reason})
    with tempfile.TemporaryDirectory(prefix="dltrain-benchmark-") as folder:
        racers = [_Racer(one, Path(folder) / str(place), fresh) for place, one in enumerate(contestants)]
        try:
            for number in range(rounds):
                for racer in racers if number % 2 == 0 else reversed(racers):
                    _ask(racer, outcome)
        finally:
            for racer in racers:
                racer.close()
    outcome.failed = {name: reason.replace(folder, "...") for name, reason in outcome.failed.items()}
    return outcome


class _Racer:
    """A contestant whose process is started when it is first needed."""

    def __init__(self, contestant: Contestant, scratch: Path, fresh: bool) -> None:
        self.name = contestant.name
        self._contestant, self._scratch, self._fresh = contestant, scratch, fresh
        self._process: Process | None = None

    def answer(self) -> dict[str, Any]:
        if self._process is None:
            self._process = Process(self._contestant, self._scratch)
            if not self._fresh:
                self._process.answer()
        answer = self._process.answer()
        if self._fresh:
            self.close()
        return answer

    def close(self) -> None:
        if self._process:
            self._process.close()
        self._process = None


def _ask(racer: _Racer, outcome: Outcome) -> None:
    if racer.name in outcome.failed:
        return
    try:
        outcome.passes.setdefault(racer.name, []).append(racer.answer())
    except ContestantError as error:
        racer.close()
        outcome.drop(racer.name, str(error))


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout
