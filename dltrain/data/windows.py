"""Time series: samples that are windows inside long members.

A member is an uncompressed ``.npy`` of shape [steps] or [steps, channels]; its windows of ``lookback + horizon`` steps
are counted and addressed by arithmetic and read by byte range, so that a series of any length is never cut into files.

    dataset = WindowDataset(open_reader("s3://bucket/load"), Window(lookback=168, horizon=24))
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from dltrain.data.index import Span
from dltrain.data.order import Integers
from dltrain.data.reader import Dataset, Reach, ShardDataset, ShardReader, open_reader
from dltrain.data.sample import Sample
from dltrain.errors import UserError

_HEADER_BYTES = 128  # of every .npy with up to two dimensions


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
class _Series:
    """One member: where its values begin, their type, and its windows."""

    sample: int
    start: int
    dtype: np.dtype[Any]
    channels: int
    steps: int


class WindowDataset:
    """A data set whose samples are windows; each has a field ``values`` [lookback + horizon, channels] and the fields
    that stand beside its series."""

    def __init__(self, reader: ShardReader, window: Window) -> None:
        self._reader = reader
        self._window = window
        self._series = [self._scan(shard) for shard in range(len(reader.manifest.shards))]
        counts = [[window.count(series.steps) for series in shard] for shard in self._series]
        self._ends = [np.cumsum(shard) for shard in counts]
        self._sizes = tuple(sum(shard) for shard in counts)
        if not sum(self._sizes):
            longest = max((series.steps for shard in self._series for series in shard), default=0)
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
        return f"{self._reader.manifest.fingerprint}/{window.lookback}+{window.horizon}/{window.stride}"

    @property
    def facts(self) -> dict[str, Any]:
        return self._reader.manifest.facts

    def read(self, shards: Integers, indices: Integers) -> list[Sample]:
        return [self._read_one(shard, index) for shard, index in zip(shards.tolist(), indices.tolist(), strict=True)]

    def _read_one(self, shard: int, index: int) -> Sample:
        place = int(np.searchsorted(self._ends[shard], index, side="right"))
        series = self._series[shard][place]
        first = (index - (int(self._ends[shard][place - 1]) if place else 0)) * self._window.stride
        row = series.dtype.itemsize * series.channels
        start = series.start + first * row
        data = self._reader.read_part(shard, start, start + self._window.steps * row)
        values = np.frombuffer(data, dtype=series.dtype).reshape(self._window.steps, series.channels)
        table = self._reader.index(shard)
        key = table.keys[series.sample]
        spans = {name: span for name, span in table.fields(series.sample).items() if name != self._window.field}
        beside = self._reader.read(shard, list(spans.values()), [key] * len(spans)) if spans else []
        where = f"{self._reader.manifest.shard_url(shard)}#{key}@{first}"
        return Sample(f"{key}@{first}", {"values": values, **dict(zip(spans, beside, strict=True))}, where)

    def _scan(self, shard: int) -> list[_Series]:
        index = self._reader.index(shard)
        members = [index.fields(sample).get(self._window.field) for sample in range(len(index))]
        for key, span in zip(index.keys, members, strict=True):
            if span is None:
                url = self._reader.manifest.shard_url(shard)
                raise UserError(f"sample {key!r} of {url} has no field {self._window.field!r} to take windows from")
        spans = [span for span in members if span is not None]
        heads = self._reader.read_ranges(shard, [Span(s.start, min(s.start + _HEADER_BYTES, s.stop), 0) for s in spans])
        found = []
        for sample, (key, span, head) in enumerate(zip(index.keys, spans, heads, strict=True)):
            header = io.BytesIO(bytes(head))
            shape, order, dtype = _read_header(header, key)
            if order or len(shape) not in (1, 2):
                raise UserError(f"series {key!r} has shape {shape}: windows need [steps] or [steps, channels], C order")
            found.append(_Series(sample, span.start + header.tell(), dtype, (*shape, 1)[1], shape[0]))
        return found


def open_dataset(url: str, memory: int = 256, window: Window | None = None, reach: Reach | None = None) -> Dataset:
    """The data set at ``url``: of windows where ``window`` is given, of whole samples otherwise.

    ``memory`` is in MiB; ``reach`` says how many shards are read in turn.
    """
    reader = open_reader(url, memory, reach)
    return ShardDataset(reader) if window is None else WindowDataset(reader, window)


def _read_header(file: io.BytesIO, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise UserError(f"series {key!r} is not a .npy array: {error}") from None
