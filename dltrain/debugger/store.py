"""Statistics on disk: segments to which every due step appends one row, and the scalars of every step.

A segment is one line of JSON (the names of its tensors and columns), filled up with spaces, and rows of float64, all of
one size: the step, and the moments of all tensors. So a step is one write, all steps of a tensor are one slice of an
array, and a row that a crash cut off is seen by its size. Other tensors, after a resume, begin another segment.

    with Store(folder) as store:
        store.begin(step=0, names=["head.weight"])
            store.scalars(step=1, values=(time.time(), 2.3, 0.5, 0.1, 0.0, 1.0))
        store.statistics(step=1, rows=rows)  # float64 [tensors, 9]
"""

from __future__ import annotations

import errno
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from dltrain import storage
from dltrain.debugger.moments import COLUMNS
from dltrain.debugger.reductions import Array
from dltrain.errors import UserError

SCALARS = ("time", "loss", "norm", "learning_rate", "loss_scale", "clip")
"""Of every step: seconds since 1970, the loss, the global gradient norm before clipping, 0 or the scale of fp16, and
what clipping multiplied gradients by."""

_ALIGNED = 512
"""Bytes that the first line is a multiple of."""

_STEPS = "steps.f64"

_PENDING = 16
"""Blocks of scalars that wait in memory, for a call of the system costs more than they do."""

_ROW = 8 * (1 + len(SCALARS))
"""Bytes of a step's scalars."""


class Segment(NamedTuple):
    """A file of rows: int steps [rows], float64 values [rows, tensors, 9]."""

    names: list[str]
    steps: np.ndarray[Any, np.dtype[np.int64]]
    values: Array


class Store:
    """Writes a run's statistics into ``folder``; made by one rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._segment: IO[bytes] | None = None
        self._steps: IO[bytes] | None = None
        self._pending: list[bytes] = []

    def begin(self, step: int, names: Sequence[str]) -> None:
        """Go on after ``step``: what was written of later steps, which will be done again, is dropped."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _cut_scalars(self._folder / _STEPS, step)
        header = _header(names)
        last = None
        for path in segments_in(self._folder):
            line = _cut(path, step)
            if line:
                last = path if line == header else None
        path = last or self._folder / f"segment-{step:08d}.f64"
        self._segment = path.open("ab", buffering=0)
        if last is None:
            self._segment.truncate(0)
            write_whole(self._segment, header)
        self._steps = (self._folder / _STEPS).open("ab", buffering=0)

    def scalars(self, step: int, values: Sequence[float]) -> None:
        """The :data:`SCALARS` of any step, due or not; in memory until :meth:`flush`."""
        self.rows([(step, *values)])

    def rows(self, rows: Iterable[Sequence[float]]) -> None:
        """The same of several steps, each with its number first."""
        self._pending.append(array("d", chain.from_iterable(rows)).tobytes())
        if len(self._pending) >= _PENDING:
            self.flush()

    def statistics(self, step: int, rows: Array) -> None:
        """Of a due step: one write, and one of the scalars so far."""
        if self._segment is not None:
            write_whole(self._segment, np.concatenate([[float(step)], rows.reshape(-1)]).tobytes())
        self.flush()

    def flush(self) -> None:
        """Scalars so far are in the file."""
        if self._steps is not None:
            write_whole(self._steps, b"".join(self._pending))
            self._pending.clear()

    def close(self) -> None:
        self.flush()
        for file in (self._segment, self._steps):
            if file is not None:
                file.close()
        self._segment = self._steps = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def write_whole(file: IO[bytes], data: bytes) -> None:
    """Append to an unbuffered file all or nothing. Raises :class:`OSError` where a disk takes a part alone."""
    written = file.write(data)
    if written != len(data):
        file.truncate(file.tell() - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def segments_in(folder: Path) -> list[Path]:
    """The segments of a run, the first first."""
    return sorted(folder.glob("segment-*.f64"))


def read_scalars(data: bytes | bytearray) -> Array:
    """Float64 [steps, 6] of what :meth:`Store.scalars` wrote: the step, and :data:`SCALARS`."""
    return np.frombuffer(data[: len(data) // _ROW * _ROW], dtype=np.float64).reshape(-1, 1 + len(SCALARS))


def read_segment(data: bytes | bytearray, where: str) -> Segment:
    """What is in a segment, but for a last row that is not whole. Raises :class:`UserError` for what is none."""
    line = data.partition(b"\n")[0]
    try:
        header = json.loads(line)
        names, columns = list(header["tensors"]), list(header["columns"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is no segment of statistics: it does not begin with their names") from None
    if columns != list(COLUMNS):
        raise UserError(f"{where} was written by another version of dltrain, with columns {', '.join(columns)}")
    width = 1 + len(names) * len(COLUMNS)
    body = data[len(line) + 1 :]
    rows = np.frombuffer(body[: len(body) // (8 * width) * 8 * width], dtype=np.float64).reshape(-1, width)
    return Segment(names, rows[:, 0].astype(np.int64), rows[:, 1:].reshape(len(rows), len(names), len(COLUMNS)))


def read_folder(url: str) -> tuple[Array, Iterator[Segment]]:
    """Scalars and segments under a path or URL. Raises :class:`UserError` where there are none."""
    found = [each for each in storage.listing(url) if each.rpartition("/")[2].startswith("segment-")]
    if not found:
        raise UserError(f"{url} has no statistics; train with --debugger.every, such as 50st")
    scalars = read_scalars(storage.read(storage.join(url, _STEPS)))
    return scalars, (read_segment(storage.read(each), each) for each in found)


def _header(names: Sequence[str]) -> bytes:
    text = json.dumps({"version": 1, "columns": COLUMNS, "tensors": list(names)}).encode()
    return text + b" " * (-(len(text) + 1) % _ALIGNED) + b"\n"


def _cut(path: Path, step: int) -> bytes:
    """Drop rows of later steps; returns the first line, or nothing where no row is left, nor the file."""
    with path.open("rb") as file:
        line = file.readline()
    names = read_segment(line, str(path)).names
    width = 1 + len(names) * len(COLUMNS)
    rows = (path.stat().st_size - len(line)) // (8 * width)
    steps = np.memmap(path, np.float64, "r", len(line), (rows, width))[:, 0] if rows else np.empty(0)
    kept = int(np.searchsorted(steps, step, side="right"))
    del steps
    if not kept:
        path.unlink()
        return b""
    os.truncate(path, len(line) + kept * 8 * width)
    return line


def _cut_scalars(path: Path, step: int) -> None:
    if path.is_file():
        rows = int(np.searchsorted(read_scalars(path.read_bytes())[:, 0], step, side="right"))
        os.truncate(path, rows * _ROW)
