"""CSV: a row is a sample, or the rows of a file or of an id are one series.

Rows: the columns of numbers become one ``npy`` vector (float32), the label column ``cls``; or as ``fields`` says.
Series: the columns of numbers are the channels of one ``.npy`` [steps, channels] float32, from which windows are taken.

    source = FileSource(files, ReadSeries(Table(files[0]), column="building", time="hour"))
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dltrain.data.formats.compression import open_stream
from dltrain.data.formats.fields import as_fields, key_of, npy
from dltrain.data.formats.source import Keyed, inside, stem
from dltrain.errors import UserError, nearest


@dataclass(frozen=True)
class Table:
    """How the files are written: ``delimiter`` between columns (a comma, or a tab in ``.tsv``, where it is empty)."""

    delimiter: str = ""

    @contextmanager
    def open(self, url: str, needed: Sequence[str]) -> Iterator[csv.DictReader[str]]:
        """The rows by the names in the first line. Raises :class:`UserError` where a needed column is missing."""
        delimiter = self.delimiter or ("\t" if url.endswith(".tsv") else ",")
        with open_stream(url) as file:
            rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
            try:
                names = list(rows.fieldnames or [])
                for name in needed:
                    if name not in names:
                        raise UserError(f"{url} has no column {name!r}; {nearest(name, names)}")
                yield rows
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"line {rows.line_num} of {url} is no CSV: {error}") from None


def rows(reader: csv.DictReader[str], url: str) -> Iterator[dict[str, str]]:
    """The rows. Raises :class:`UserError` for one with more or fewer cells than there are columns."""
    for row in reader:
        if None in row or None in row.values():
            raise UserError(f"line {reader.line_num} of {url} has another number of cells than the first line")
        yield row


def number(text: str, name: str, where: str) -> float:
    """A cell as a number; an empty one is not one (nan)."""
    try:
        return float(text) if text.strip() else float("nan")
    except ValueError:
        raise UserError(f"{where} has {text!r} in column {name!r}, which is no number") from None


@dataclass(frozen=True)
class ReadRows:
    """A sample per row: fields as ``fields`` names them, or ``npy`` of all columns but ``key`` and ``label``."""

    table: Table
    folder: str
    fields: Mapping[str, str] | None = None
    key: str = ""
    label: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, url: str) -> Iterator[Keyed]:
        needed = [name for name in (self.key, self.label, *(self.fields or {}).values()) if name]
        with self.table.open(url, needed) as reader:
            for place, row in enumerate(rows(reader, url)):
                where = f"line {reader.line_num} of {url}"
                key = key_of(row[self.key]) if self.key else f"{stem(inside(url, self.folder))}/{place:08d}"
                yield key, self._fields(row, where)

    def _fields(self, row: dict[str, str], where: str) -> dict[str, bytes]:
        label = {"cls": b"%d" % self._class(row[self.label], where)} if self.label else {}
        if self.fields is not None:
            values = {name: _typed(field, row[name], name, where) for field, name in self.fields.items()}
            return {**as_fields(values, self.fields), **label}
        inputs = [number(text, name, where) for name, text in row.items() if name not in (self.key, self.label)]
        return {"npy": npy(np.array(inputs, dtype=np.float32)), **label}

    def _class(self, text: str, where: str) -> int:
        if text not in self.classes:
            raise UserError(f"{where} has class {text!r}, which was not there when the classes were counted")
        return self.classes[text]


def _typed(field: str, text: str, name: str, where: str) -> Any:
    """Text as it is for texts; a number for fields of numbers."""
    extension = field.rpartition(".")[2]
    return number(text, name, where) if extension in ("cls", "json", "npy") else text


def find_classes(table: Table, files: Sequence[str], label: str) -> dict[str, int]:
    """Number of each class: of whole numbers the number itself, of names the place among all names, sorted."""
    names: set[str] = set()
    for url in files:
        with table.open(url, [label]) as reader:
            names.update(row[label] for row in rows(reader, url))
    if names and all(name.strip().isdigit() for name in names):
        return {name: int(name) for name in names}
    return {name: place for place, name in enumerate(sorted(names))}


@dataclass(frozen=True)
class ReadSeries:
    """A sample per file, or per value of ``column``: its rows in order are the steps.

    ``time`` is a column that is no channel and must not go backwards within a series. A file is held in memory.
    """

    table: Table
    folder: str
    column: str = ""
    time: str = ""
    channels: tuple[str, ...] = ()

    def __call__(self, url: str) -> Iterator[Keyed]:
        for key, values in self.series(url):
            yield key, {"npy": npy(values)}

    def series(self, url: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Key and values [steps, channels] of each series of a file, in the order of their first rows."""
        needed = [name for name in (self.column, self.time, *self.channels) if name]
        found: dict[str, list[list[float]]] = {}
        times: dict[str, str] = {}
        with self.table.open(url, needed) as reader:
            for row in rows(reader, url):
                where = f"line {reader.line_num} of {url}"
                name = row[self.column] if self.column else ""
                self._check_time(times, name, row, where)
                found.setdefault(name, []).append([number(row[channel], channel, where) for channel in self.channels])
        for name, steps in found.items():
            yield key_of(name) if self.column else stem(inside(url, self.folder)), np.array(steps, dtype=np.float32)

    def _check_time(self, times: dict[str, str], name: str, row: dict[str, str], where: str) -> None:
        if not self.time:
            return
        before, now = times.get(name, ""), row[self.time]
        if before and _moment(now) < _moment(before):
            raise UserError(f"{where} has {self.time} {now!r} after {before!r}; sort the rows by time")
        times[name] = now


def _moment(text: str) -> tuple[int, float, str]:
    """What times are compared by: numbers as numbers, dates as ISO writes them, by their letters."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def find_channels(table: Table, url: str, others: Sequence[str]) -> tuple[str, ...]:
    """The columns of a file but the others."""
    with table.open(url, [name for name in others if name]) as reader:
        return tuple(name for name in reader.fieldnames or () if name not in others)


def find_scales(files: Sequence[str], read: ReadSeries, season: int) -> dict[str, dict[str, Any]]:
    """Mean, deviation and mean error of the seasonal naive forecast of every series: numbers, or lists by channel."""
    scales = {}
    for url in files:
        for key, values in read.series(url):
            values = values.astype(np.float64)
            ahead = np.abs(values[season:] - values[:-season]) if len(values) > season else np.zeros_like(values[:1])
            scales[key] = {
                "mean": _plain(np.nanmean(values, 0)),
                "deviation": _plain(np.nanstd(values, 0)),
                "seasonal_error": _plain(np.nanmean(ahead, 0)),
            }
    return scales


def _plain(values: NDArray[np.float64]) -> float | list[float]:
    return float(values[0]) if len(values) == 1 else values.tolist()
