"""``metrics.jsonl``: a record per logged step and per evaluation, one JSON object a line, written by rank 0."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any

from dltrain import storage
from dltrain.hooks.base import Hook, View
from dltrain.run_folder import read_lines


class Records(Hook):
    """Appends to ``path``. A resumed run first drops the records of steps that will be done again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def fit_start(self, trainer: View) -> None:
        kept = [line for line in read_lines(self._path) if line.get("step", 0) <= trainer.step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(str(self._path), "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self._path.open("a", buffering=1)

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        self._write("step", record)

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> None:
        self._write("evaluation", record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **record}) + "\n")
