"""Time series: samples that are windows inside long members.

A member is an uncompressed ``.npy`` of shape [steps] or [steps, channels]; its windows of ``lookback + horizon`` steps
are counted and addressed by arithmetic and read by byte range, so that a series of any length is never cut into files.

    dataset = WindowDataset(open_reader("s3://bucket/load"), Window(lookback=168, horizon=24))
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dltrain.data.files import Range
from dltrain.data.order import Integers, SampleOrder
from dltrain.data.reader import ShardReader, follow
from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError
from dltrain.storage.counters import count

_HEADER_BYTES = 128  # of every .npy with up to two dimensions
_SCANNED_AT_ONCE = 64  # shards


@dataclass(frozen=True)
class Window:
    """``lookback`` steps of past and ``horizon`` steps of future, one window every ``stride`` steps."""

    lookback: int
    horizon: int
    stride: int = 1
    field: str = "npy"

    @property
    def steps(self) -> int:
        return self.lookback + self.horizon

    def count(self, steps: int) -> int:
        """Windows in a series of ``steps`` steps."""
        return max(0, (steps - self.steps) // self.stride + 1)


@dataclass(frozen=True)
class _Shard:
    """The series of one shard, one after the other: where their values begin, and where their windows end."""

    start: NDArray[np.int64]  # [series], byte of the first value
    row: NDArray[np.int64]  # [series], bytes of one step
    ends: NDArray[np.int64]  # [series], windows up to and with each
    kind: NDArray[np.int64]  # [series], place in `kinds`
    kinds: tuple[tuple[np.dtype[Any], int], ...]
    """Type, and number of channels."""
    longest: int


class WindowDataset:
    """A data set whose samples are windows; each has a field ``values`` [lookback + horizon, channels] and the fields
    that stand beside its series."""

    def __init__(self, reader: ShardReader, window: Window) -> None:
        self.reader = reader
        self._window = window
        end = len(reader.manifest.shards)
        some = (range(first, min(first + _SCANNED_AT_ONCE, end)) for first in range(0, end, _SCANNED_AT_ONCE))
        self._shards = [table for shards in some for table in self._scan(shards)]
        self._sizes = tuple(int(shard.ends[-1]) if len(shard.ends) else 0 for shard in self._shards)
        self._checked: set[tuple[int, int]] = set()
        if not sum(self._sizes):
            longest = max((shard.longest for shard in self._shards), default=0)
            raise UserError(
                f"no series of {reader.manifest.url} holds a window of {window.lookback} + {window.horizon} steps "
                f"(the longest has {longest}); make the lookback or the horizon shorter"
            )

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def fingerprint(self) -> str:
        window = self._window
        return f"{self.reader.manifest.fingerprint}/{window.lookback}+{window.horizon}/{window.stride}"

    @property
    def facts(self) -> dict[str, Any]:
        return self.reader.manifest.facts

    def follow(self, order: SampleOrder, node: int, nodes: int) -> None:
        follow(self.reader, order, node, nodes)

    def advance(self, position: int) -> None:
        self.reader.files.advance(position)

    def rest(self) -> None:
        self.reader.files.rest()

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        began = time.perf_counter()
        samples: list[Any] = [None] * len(shards)
        order = np.argsort(shards, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            found = self._read_shard(int(shards[group[0]]), indices[group])
            for place, sample in zip(group.tolist(), found, strict=True):
                samples[place] = sample
        count(read_seconds=time.perf_counter() - began)
        return samples

    def _read_shard(self, shard: int, indices: Integers) -> list[Sample]:
        table, url = self._shards[shard], self.reader.manifest.shard_url(shard)
        series = np.searchsorted(table.ends, indices, side="right")
        first = (indices - np.where(series > 0, table.ends[series - 1], 0)) * self._window.stride
        values = self._values(shard, series, table.start[series] + first * table.row[series])
        beside = {member: self._beside(shard, member) for member in np.unique(series).tolist()}
        keys = {member: self.reader.index(shard).key(member) for member in beside}
        return [
            Sample(f"{keys[member]}@{step}", {"values": piece, **beside[member]}, url)
            for member, step, piece in zip(series.tolist(), first.tolist(), values, strict=True)
        ]

    def _values(self, shard: int, series: Integers, starts: Integers) -> list[NDArray[Any]]:
        """The windows that begin at these bytes, each [steps, channels]."""
        table, steps = self._shards[shard], self._window.steps
        sizes = (steps * table.row[series]).tolist()
        pieces = self._pieces(shard, list(zip(starts.tolist(), sizes, strict=True)))
        short = next((piece for piece, size in zip(pieces, sizes, strict=True) if len(piece) < size), None)
        if short is not None:
            url = self.reader.manifest.shard_url(shard)
            raise BadSample(f"shard {url} is truncated: a window has {len(short)} bytes instead of {max(sizes)}")
        kinds = [((steps, channels), dtype) for dtype, channels in table.kinds]
        return [
            np.ndarray(kinds[kind][0], kinds[kind][1], piece)
            for piece, kind in zip(pieces, table.kind[series].tolist(), strict=True)
        ]

    def _pieces(self, shard: int, ranges: list[Range]) -> list[bytes]:
        pages = self.reader.files.pages([shard])[0]
        if pages is None:
            return self.reader.files.read([(shard, ranges)])[0]
        return [pages[start : start + size] for start, size in ranges]

    def _beside(self, shard: int, series: int) -> dict[str, Any]:
        """The other fields of a series, which is checked itself when it is first met: its checksum covers the whole
        member, and a window is a part of it. Where only ranges are read, windows are not checked."""
        members = self.reader.index(shard).members(series)
        others = [member for member in members if member[0] != self._window.field]
        if (shard, series) not in self._checked and self.reader.files.pages([shard])[0] is not None:
            self.reader.samples([shard], [series])
            self._checked.add((shard, series))
        if not others:
            return {}
        whole = self.reader.samples([shard], [series])[0].fields
        return {name: whole[name] for name, *_ in others}

    def _scan(self, shards: Sequence[int]) -> Iterator[_Shard]:
        """Tables of some shards, whose headers are read at the same time."""
        indexes = self.reader.indexes(shards)
        spans = [
            [self._member(shard, sample) for sample in range(len(index))]
            for shard, index in zip(shards, indexes, strict=True)
        ]
        requests = [
            (shard, [(start, min(size, _HEADER_BYTES)) for start, size in members])
            for shard, members in zip(shards, spans, strict=True)
        ]
        for index, members, heads in zip(indexes, spans, self.reader.files.read(requests), strict=True):
            found = [_read_header(head, index.key(sample)) for sample, head in enumerate(heads)]
            yield self._table([start for start, _ in members], found)

    def _table(self, starts: list[int], headers: list[_Header]) -> _Shard:
        kinds = list(dict.fromkeys((header.dtype, header.channels) for header in headers))
        return _Shard(
            start=np.array([start + h.bytes for start, h in zip(starts, headers, strict=True)], dtype=np.int64),
            row=np.array([header.dtype.itemsize * header.channels for header in headers], dtype=np.int64),
            ends=np.cumsum([self._window.count(header.steps) for header in headers], dtype=np.int64),
            kind=np.array([kinds.index((header.dtype, header.channels)) for header in headers], dtype=np.int64),
            kinds=tuple(kinds),
            longest=max((header.steps for header in headers), default=0),
        )

    def _member(self, shard: int, sample: int) -> Range:
        index = self.reader.index(shard)
        for name, start, size, _ in index.members(sample):
            if name == self._window.field:
                return start, size
        url = self.reader.manifest.shard_url(shard)
        raise UserError(
            f"sample {index.key(sample)!r} of {url} has no field {self._window.field!r} to take windows from"
        )


@dataclass(frozen=True)
class _Header:
    """What stands before the values of a ``.npy``; ``bytes`` is its own length."""

    dtype: np.dtype[Any]
    steps: int
    channels: int
    bytes: int


def _read_header(head: bytes, key: str) -> _Header:
    file = io.BytesIO(head)
    try:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise UserError(f"series {key!r} is not a .npy array: {error}") from None
    if fortran or len(shape) not in (1, 2):
        raise UserError(f"series {key!r} has shape {shape}: windows need [steps] or [steps, channels], in C order")
    return _Header(dtype, shape[0], (*shape, 1)[1], file.tell())
