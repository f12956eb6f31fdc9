"""Parquet: a data set whose shards are row groups, read where it lies; binary, text, number, list and image columns.

Suited to conversion and to rows that are read nearly in order: a row group is decoded whole to get at one of its rows.

    dataset = ParquetDataset("s3://bucket/flowers", fields={"jpg": "image", "cls": "label"})
    print(dataset.facts.get("classes"))
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.formats.fields import as_fields, key_of
from dltrain.data.formats.source import find_files, folder_url, inside, stem
from dltrain.data.sample import Sample
from dltrain.errors import UserError, nearest

_TAIL = 64 << 10
"""Bytes in which most footers lie."""


@dataclass(frozen=True)
class _Group:
    """One row group: its file, its number and its first row there."""

    url: str
    number: int
    first: int
    rows: int
    bytes: int


class ParquetDataset:
    """The rows of all Parquet files below ``url``.

    ``fields`` names the column of each field; without it every column becomes one. ``key`` is the column of keys,
    which are file and row without it. ``memory`` MiB of decoded row groups are kept, and at least one.
    """

    def __init__(self, url: str, fields: Mapping[str, str] | None = None, key: str = "", memory: int = 1024) -> None:
        _require_pyarrow(url)
        self._folder, self._fields, self._key, self._memory = folder_url(url), fields, key, memory << 20
        self._tables: OrderedDict[int, Any] = OrderedDict()
        files = find_files(url, lambda name: name.endswith((".parquet", ".pq")), "Parquet files")
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(_read_footer, files))
        self._schema = footers[0].metadata.schema.to_arrow_schema()
        self._columns = self._choose(footers)
        self._groups = [group for footer in footers for group in _groups(footer)]
        content = [[footer.url.removeprefix(self._folder), footer.crc32c] for footer in footers]
        self.fingerprint = hashlib.sha256(json.dumps([content, fields, key]).encode()).hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(group.rows for group in self._groups)

    @property
    def facts(self) -> dict[str, Any]:
        """Class names, where the files were written by Hugging Face's datasets with one label column."""
        written = json.loads((self._schema.metadata or {}).get(b"huggingface", b"{}"))
        features = written.get("info", {}).get("features", {})
        names = [features[column]["names"] for column in self._columns if "names" in features.get(column, {})]
        return {"classes": names[0]} if len(names) == 1 else {}

    def read(self, shards: NDArray[np.int64], indices: NDArray[np.int64]) -> list[Sample]:
        samples: list[Any] = [None] * len(shards)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            found = self._rows(shard, indices[places])
            for place, sample in zip(places.tolist(), found, strict=True):
                samples[place] = sample
        return samples

    def bytes_per_sample(self) -> int:
        """The mean over all row groups, uncompressed."""
        rows = sum(group.rows for group in self._groups)
        return sum(group.bytes for group in self._groups) // max(1, rows)

    def _rows(self, shard: int, rows: NDArray[np.int64]) -> list[Sample]:
        import pyarrow

        group = self._groups[shard]
        table = self._table(shard).take(pyarrow.array(rows))
        columns = {name: _values(table.column(name)) for name in table.column_names}
        samples = []
        for place, row in enumerate((rows + group.first).tolist()):
            values = {name: column[place] for name, column in columns.items()}
            try:
                key = self._key_of(values, group, row)
                samples.append(Sample(key, as_fields(values, self._fields), f"{group.url}#group-{group.number}"))
            except UserError as error:
                raise UserError(f"row {row} of {group.url}: {error}") from None
        return samples

    def _key_of(self, values: dict[str, Any], group: _Group, row: int) -> str:
        if not self._key:
            return f"{stem(inside(group.url, self._folder))}/{row:08d}"
        key = values[self._key] if self._fields else values.pop(self._key)
        if key is None:
            raise UserError(f"it has no key: its column {self._key!r} is empty")
        return key_of(key)

    def _table(self, shard: int) -> Any:
        if shard not in self._tables:
            self._tables[shard] = self._decode(self._groups[shard])
            while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > self._memory:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _decode(self, group: _Group) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            with storage.open_object(group.url) as file:
                reader = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
                return reader.read_row_group(group.number, columns=self._columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"row group {group.number} of {group.url} cannot be read: {_line(error)}") from None

    def _choose(self, footers: list[_Footer]) -> list[str]:
        """The columns to read. Raises :class:`UserError` where one is missing or of a type that makes no field."""
        first = footers[0].url
        for footer in footers:
            if not footer.metadata.schema.to_arrow_schema().equals(self._schema):
                raise UserError(f"{footer.url} has other columns than {first}; the files of a data set need the same")
        wanted = list(self._schema.names if self._fields is None else dict.fromkeys(self._fields.values()))
        wanted += [self._key] if self._key and self._key not in wanted else []
        missing = next((name for name in wanted if name not in self._schema.names), None)
        if missing is not None:
            raise UserError(f"{first} has no column {missing!r}; {nearest(missing, self._schema.names)}")
        for name in wanted:
            if not _is_readable(self._schema.field(name).type):
                raise UserError(
                    f"column {name!r} of {first} is of type {self._schema.field(name).type}, which makes no field; "
                    "name the columns that become fields, for example --fields jpg=image,cls=label"
                )
        return wanted


@dataclass(frozen=True)
class _Footer:
    """What a file says of itself, and the crc32c of that."""

    url: str
    metadata: Any
    crc32c: int


def _read_footer(url: str) -> _Footer:
    import pyarrow
    import pyarrow.parquet

    size = storage.size(url)
    tail = bytes(storage.read(url, max(0, size - _TAIL), size))
    if tail[-4:] != b"PAR1":
        raise UserError(f"{url} is no Parquet file, or a truncated one: it does not end with PAR1")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        tail = bytes(storage.read(url, max(0, size - length), size))
    try:
        metadata = pyarrow.parquet.read_metadata(io.BytesIO(b"PAR1" + tail[-length:]))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the footer of {url} cannot be read: {_line(error)}") from None
    return _Footer(url, metadata, google_crc32c.value(tail[-length:]))


def _groups(footer: _Footer) -> list[_Group]:
    groups, first = [], 0
    for number in range(footer.metadata.num_row_groups):
        group = footer.metadata.row_group(number)
        groups.append(_Group(footer.url, number, first, group.num_rows, group.total_byte_size))
        first += group.num_rows
    return groups


def _values(column: Any) -> list[Any]:
    """A column's values as Python's own, lists of numbers as arrays of their type."""
    leaf, values = _leaf(column.type), column.to_pylist()
    if leaf == column.type:
        return values
    return [None if value is None else np.asarray(value, dtype=leaf.to_pandas_dtype()) for value in values]


def _leaf(kind: Any) -> Any:
    """What a list, or a list of lists, holds; any other type itself."""
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind


def _is_readable(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return {kind.field(place).name for place in range(kind.num_fields)} == {"bytes", "path"}
    leaf = _leaf(kind)
    if types.is_integer(leaf) or types.is_floating(leaf) or types.is_boolean(leaf):
        return True
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return any(test(plain) for test in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string))


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _require_pyarrow(url: str) -> None:
    try:
        import pyarrow  # noqa: F401  large, and only these files need it
    except ImportError:
        raise UserError(f"reading the Parquet files of {url} needs pyarrow: pip install 'dltrain[formats]'") from None
