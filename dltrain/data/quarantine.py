"""Bad samples within a budget: counted once each, and told in a file.

Each rank has a file of its own in one folder: a line of JSON per sample, as it was first met. A run that starts again
reads all of them, so the budget is the run's and not the start's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dltrain.errors import UserError


@dataclass(frozen=True)
class Bad:
    """A sample left out: where it stands in the order and in the data, what came in its place, and why."""

    position: int
    replaced_by: int
    shard: int
    index: int
    reason: str


class Quarantine:
    """At most ``allowed`` bad samples of a run; ``file`` is this rank's list, kept in memory alone where it is None."""

    def __init__(self, allowed: int, file: Path | None = None) -> None:
        self._allowed, self._file = allowed, file
        self._known = set(_listed(file.parent)) if allowed and file is not None else set[tuple[int, int]]()

    def add(self, bad: Bad) -> None:
        """Note a sample that has been replaced. Raises :class:`UserError` when it is one too many."""
        sample = bad.shard, bad.index
        if sample in self._known:
            return
        if len(self._known) >= self._allowed:  # it is not listed: a run that starts again meets it again
            where = "" if self._file is None else f"; the others are listed in {self._file.parent}"
            raise UserError(
                f"{len(self._known) + 1} samples are bad and data.bad_samples allows {self._allowed}: mend the data, "
                f"or allow more{where}; the last: {bad.reason}"
            )
        self._known.add(sample)
        if self._file is not None:
            _append(self._file, json.dumps(asdict(bad)))


def _listed(folder: Path) -> Iterator[tuple[int, int]]:
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                yield entry["shard"], entry["index"]
            except (ValueError, TypeError, KeyError):  # cut off by a kill; who wrote it will meet the sample again
                continue


def _append(file: Path, line: str) -> None:
    """A line of its own, also behind one that was cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut_off = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as lines:
        lines.write("\n" * cut_off + line + "\n")
