"""Histograms on disk: a file to which every due step appends one record.

A record is its step and size, and then, compressed, a line of JSON with the names of its tensors, and their counts,
float64 [tensors, BINS]. Most bins are empty, so a record takes about a kilobyte for each tensor.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from struct import Struct
from typing import IO

import numpy as np

from dltrain.debugger.histograms import BINS
from dltrain.debugger.reductions import Array
from dltrain.debugger.store import write_whole

NAME = "histograms.z"

_HEAD = Struct("=qq")


class HistogramFile:
    """Writes the histograms of a run; made by one rank."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after ``step``: records of later steps, which will be done again, are dropped."""
        path = folder / NAME
        if path.is_file():
            data = path.read_bytes()
            os.truncate(path, max((end for found, _, end in _records(data) if found <= step), default=0))
        self._file: IO[bytes] = path.open("ab", buffering=0)

    def write(self, step: int, counts: Mapping[str, Array]) -> None:
        """Those of a due step, in one write."""
        body = json.dumps(list(counts)).encode() + b"\n" + np.stack(list(counts.values())).tobytes()
        packed = zlib.compress(body, 1)
        write_whole(self._file, _HEAD.pack(step, len(packed)) + packed)

    def close(self) -> None:
        self._file.close()


def read_histograms(data: bytes | bytearray) -> dict[int, dict[str, Array]]:
    """By step and name, float64 [BINS]; a last record that is not whole is left out."""
    found: dict[int, dict[str, Array]] = {}
    for step, start, end in _records(data):
        line, _, body = zlib.decompress(data[start:end]).partition(b"\n")
        names = json.loads(line)
        found[step] = dict(zip(names, np.frombuffer(body).reshape(len(names), BINS), strict=True))
    return found


def _records(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Step, start and end of each whole record."""
    start = _HEAD.size
    while start <= len(data):
        step, size = _HEAD.unpack_from(data, start - _HEAD.size)
        if start + size > len(data):
            return
        yield step, start, start + size
        start += size + _HEAD.size
