"""What rank 0 writes of a run: statistics, histograms, findings, and what else was observed. A part that cannot be
written is told once and left out; training goes on, unless it was asked to be strict.

    debugger/statistics/  evaluations/  histograms.z  findings.jsonl  observations.jsonl  tensors/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from dltrain import storage
from dltrain.debugger.findings import Finding
from dltrain.debugger.histogram_store import HistogramFile
from dltrain.debugger.seen import Tensors
from dltrain.debugger.store import Store
from dltrain.errors import UserError
from dltrain.run_folder import read_lines
from dltrain.runtime.environment import Environment

FINDINGS, OBSERVATIONS, RAW, EVALUATIONS = "findings.jsonl", "observations.jsonl", "tensors", "evaluations"


class Guard:
    """Runs what may fail without ending the run; what failed once is not tried again."""

    def __init__(self, environment: Environment, strict: bool) -> None:
        self._environment, self._strict = environment, strict
        self._failed: set[str] = set()

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; ``None`` once that part has failed. Raises :class:`UserError` where it is strict."""
        if part in self._failed:
            return None
        try:
            return work()
        except (OSError, UserError) as error:
            self._failed.add(part)
            told = f"the debugger cannot write {part} ({error})"
            if self._strict:
                raise UserError(f"{told}; mend that, or let training go on without, by debugger.strict false") from None
            told = f"rank {self._environment.rank}: {told}" if self._environment.rank else told
            print(f"warning: {told}; training goes on without {part}", file=sys.stderr, flush=True)
        return None


class Recorder:
    """Writes into ``folder``, after ``step``, which the run goes on from."""

    def __init__(self, folder: Path, guard: Guard, step: int, names: Sequence[str], histograms: bool) -> None:
        self._guard = guard
        self._store = Store(folder / "statistics")
        guard("statistics", lambda: self._store.begin(step, names))
        self._findings: IO[str] | None = guard("findings", lambda: _resumed(folder / FINDINGS, step))
        self._observations: IO[str] | None = guard("observations", lambda: _resumed(folder / OBSERVATIONS, step))
        self._folder, self._after = folder, step
        self._evaluations: Store | None = None
        self._histograms: HistogramFile | None = None
        if histograms:
            self._histograms = guard("histograms", lambda: HistogramFile(folder, step))

    def scalars(self, step: int, values: Sequence[float]) -> None:
        """Of every step."""
        self._store.scalars(step, values)

    def rows(self, rows: Iterable[Sequence[float]]) -> None:
        """Scalars of several steps, each with its number first."""
        self._guard("statistics", partial(self._store.rows, rows))

    def statistics(self, step: int, tensors: Tensors) -> None:
        """Of a due step: moments, and counts in bins."""
        self._guard("statistics", lambda: self._store.statistics(step, tensors.rows))
        file = self._histograms
        if tensors.counts and file is not None:
            self._guard("histograms", lambda: file.write(step, tensors.counts))

    def evaluation(self, step: int, tensors: Tensors) -> None:
        """Of modules in an evaluation after that step."""
        if self._evaluations is None:
            self._evaluations = Store(self._folder / EVALUATIONS)
            begin = partial(self._evaluations.begin, self._after, tensors.index.names)
            self._guard("statistics of evaluations", begin)
        write = partial(self._evaluations.statistics, step, tensors.rows)
        self._guard("statistics of evaluations", write)

    def finding(self, finding: Finding) -> None:
        self._line("findings", self._findings, finding.as_json())

    def observed(self, step: int, kind: str, value: Any, evaluation: bool = False) -> None:
        """What was seen of another kind, as JSON; of an evaluation after that step, or of the step itself."""
        record = {"step": step, "kind": kind, "evaluation": evaluation, "value": value}
        self._line("observations", self._observations, json.dumps(record))

    def flush(self) -> None:
        """Scalars so far are in the file."""
        self._guard("statistics", self._store.flush)

    def close(self) -> None:
        for store in (self._store, self._evaluations):
            if store is not None:
                self._guard("statistics", store.close)
        for file in (self._findings, self._observations, self._histograms):
            if file is not None:
                self._guard("what is left", file.close)

    def _line(self, part: str, file: IO[str] | None, text: str) -> None:
        if file is not None:
            self._guard(part, lambda: file.write(text + "\n"))


def _resumed(path: Path, step: int) -> IO[str]:
    """The lines of steps that will not be done again, and what follows."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(str(path), "".join(json.dumps(line) + "\n" for line in kept).encode())
    return path.open("a", buffering=1)
