"""The index of one shard: where each member lies in the tar, and its checksum.

Members that share a key are one sample, as in webdataset: ``0001.png`` and ``0001.cls`` are the fields ``png`` and
``cls`` of sample ``0001``. On disk an index is a line of JSON (counts and extensions), then little-endian arrays.

    index = scan(tar_bytes)
    png = index.fields(17)["png"]
    assert google_crc32c.value(tar_bytes[png.start : png.stop]) == png.crc32c
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dltrain.errors import UserError

_MAGIC = "dltrain-index-1"


@dataclass(frozen=True)
class Span:
    """Bytes ``[start, stop)`` of the tar and their crc32c."""

    start: int
    stop: int
    crc32c: int


@dataclass(frozen=True)
class ShardIndex:
    """Members in the order of the tar; sample i owns members ``first[i]`` to ``first[i + 1]``."""

    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    first: NDArray[np.uint32]  # [samples + 1]
    extension: NDArray[np.uint16]  # [members], place in `extensions`
    offset: NDArray[np.uint64]  # [members]
    size: NDArray[np.uint64]  # [members]
    crc32c: NDArray[np.uint32]  # [members]

    def __len__(self) -> int:
        return len(self.keys)

    def fields(self, sample: int) -> dict[str, Span]:
        """Where each field of a sample lies."""
        spans = {}
        for member in range(int(self.first[sample]), int(self.first[sample + 1])):
            start = int(self.offset[member])
            spans[self.extensions[self.extension[member]]] = Span(
                start, start + int(self.size[member]), int(self.crc32c[member])
            )
        return spans

    def to_bytes(self) -> bytes:
        header = {"format": _MAGIC, "keys": self.keys, "extensions": self.extensions, "members": len(self.offset)}
        arrays = (self.first, self.extension, self.offset, self.size, self.crc32c)
        return json.dumps(header).encode() + b"\n" + b"".join(array.tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> ShardIndex:
        """Read what :meth:`to_bytes` wrote. Raises ``ValueError`` when it is something else."""
        line, _, rest = bytes(data).partition(b"\n")
        header = json.loads(line)
        if header.get("format") != _MAGIC:
            raise ValueError(f"format is {header.get('format')!r}, not {_MAGIC!r}")
        members = header["members"]
        counts = (len(header["keys"]) + 1, members, members, members, members)
        kinds = (np.uint32, np.uint16, np.uint64, np.uint64, np.uint32)
        arrays, start = [], 0
        for kind, count in zip(kinds, counts, strict=True):
            arrays.append(np.frombuffer(rest, dtype=np.dtype(kind).newbyteorder("<"), count=count, offset=start))
            start += arrays[-1].nbytes
        return cls(tuple(header["keys"]), tuple(header["extensions"]), *arrays)


def scan(data: bytes | bytearray, where: str = "the tar") -> ShardIndex:
    """Index a whole tar in memory. Raises :class:`UserError` when it is no tar or is cut short."""
    keys: list[str] = []
    places: dict[str, int] = {}
    first, extension = [0], list[int]()
    offset, size, crc = list[int](), list[int](), list[int]()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, field = split_name(member.name)
                if not keys or keys[-1] != key:
                    if keys:
                        first.append(len(offset))
                    keys.append(key)
                stop = member.offset_data + member.size
                if stop > len(data):
                    raise UserError(f"{where} is truncated: {member.name} ends at byte {stop} of {len(data)}")
                extension.append(places.setdefault(field, len(places)))
                offset.append(member.offset_data)
                size.append(member.size)
                crc.append(google_crc32c.value(bytes(memoryview(data)[member.offset_data : stop])))
    except tarfile.TarError as error:
        raise UserError(f"{where} is not a readable tar: {error}") from None
    first = [*first, len(offset)] if keys else [0]
    return ShardIndex(
        tuple(keys),
        tuple(places),
        np.array(first, dtype="<u4"),
        np.array(extension, dtype="<u2"),
        np.array(offset, dtype="<u8"),
        np.array(size, dtype="<u8"),
        np.array(crc, dtype="<u4"),
    )


def split_name(name: str) -> tuple[str, str]:
    """Key and field of a member: the base name is cut at its first dot, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}{slash}{stem}", field.lower()
