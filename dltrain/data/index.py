"""The index of one shard: where each member lies in the file, and its checksum.

Members that share a key are one sample, as in webdataset: ``0001.png`` and ``0001.cls`` are the fields ``png`` and
``cls`` of sample ``0001``. On disk an index is a line of JSON (counts and extensions), then little-endian arrays and
the keys, some 30 bytes per member; in memory it is those same bytes.

    index = ShardIndex.from_bytes(storage.read("s3://bucket/digits/shard-000000.tar.idx"))
    for field, start, size, crc32c in index.members(17):
        assert google_crc32c.value(tar[start : start + size]) == crc32c
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = "dltrain-index-2"
_KINDS = {"offset": "<u8", "size": "<u8", "crc32c": "<u4", "first": "<u4", "key_end": "<u4", "extension": "<u2"}

Member = tuple[str, int, int, int]
"""Field, first byte in the shard, bytes, crc32c."""


@dataclass(frozen=True)
class ShardIndex:
    """Members in the order of the file; sample i owns members ``first[i]`` to ``first[i + 1]``."""

    extensions: tuple[str, ...]
    offset: NDArray[np.uint64]  # [members]
    size: NDArray[np.uint64]  # [members]
    crc32c: NDArray[np.uint32]  # [members]
    first: NDArray[np.uint32]  # [samples + 1]
    key_end: NDArray[np.uint32]  # [samples], in `keys`
    extension: NDArray[np.uint16]  # [members], place in `extensions`
    keys: bytes  # UTF-8, one after the other
    _quick: tuple[memoryview, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # a memoryview gives one integer 4 times as fast as an array does, and a batch asks for a few of each shard
        arrays = (self.first, self.extension, self.offset, self.size, self.crc32c, self.key_end)
        object.__setattr__(
            self, "_quick", tuple(memoryview(np.require(array, requirements=["C", "A"]).data) for array in arrays)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_quick"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        """The name of a sample."""
        ends = self._quick[5]
        return self.keys[ends[sample - 1] if sample else 0 : ends[sample]].decode()

    def members(self, sample: int) -> list[Member]:
        """The fields of a sample, in the order of the file."""
        first, extension, offset, size, crc32c, _ = self._quick
        return [
            (self.extensions[extension[place]], offset[place], size[place], crc32c[place])
            for place in range(first[sample], first[sample + 1])
        ]

    def to_bytes(self) -> bytes:
        header = {
            "format": _MAGIC,
            "samples": len(self),
            "members": len(self.offset),
            "keys": len(self.keys),
            "extensions": self.extensions,
        }
        arrays = (getattr(self, name).astype(kind).tobytes() for name, kind in _KINDS.items())
        line = json.dumps(header).encode()
        line += b" " * (-(len(line) + 1) % 8) + b"\n"  # so that the arrays behind it are aligned
        return line + b"".join(arrays) + self.keys

    @classmethod
    def from_bytes(cls, data: bytes | bytearray) -> ShardIndex:
        """Read what :meth:`to_bytes` wrote. Raises ``ValueError`` when it is something else."""
        data = bytes(data)
        line, _, _ = data.partition(b"\n")
        header = json.loads(line)
        if not isinstance(header, dict) or header.get("format") != _MAGIC:
            raise ValueError(f"it does not begin with the format {_MAGIC!r}")
        samples, members = int(header["samples"]), int(header["members"])
        counts = {"first": samples + 1, "key_end": samples}
        arrays, start = {}, len(line) + 1
        for name, kind in _KINDS.items():
            arrays[name] = np.frombuffer(data, kind, counts.get(name, members), start)
            start += arrays[name].nbytes
        if len(data) != start + header["keys"]:
            raise ValueError(f"it has {len(data)} bytes instead of {start + header['keys']}")
        return cls(tuple(header["extensions"]), keys=data[start:], **arrays)


class IndexBuilder:
    """Collects the members of a shard in the order of the file.

    builder = IndexBuilder()
    builder.add("0001", "png", offset=512, size=7000, crc32c=0x1234)
    index = builder.build()
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._places: dict[str, int] = {}
        self._first: list[int] = []
        self._members: list[tuple[int, int, int, int]] = []

    def add(self, key: str, extension: str, offset: int, size: int, crc32c: int) -> None:
        """Add a member; it belongs to the sample of the member before where their keys are equal."""
        encoded = key.encode()
        if not self._keys or self._keys[-1] != encoded:
            self._first.append(len(self._members))
            self._keys.append(encoded)
        self._members.append((offset, size, crc32c, self._places.setdefault(extension, len(self._places))))

    def build(self) -> ShardIndex:
        """The index of all members so far."""
        columns = np.array(self._members, dtype=np.uint64).reshape(-1, 4)
        return ShardIndex(
            extensions=tuple(self._places),
            offset=columns[:, 0].astype("<u8"),
            size=columns[:, 1].astype("<u8"),
            crc32c=columns[:, 2].astype("<u4"),
            first=np.array([*self._first, len(self._members)], dtype="<u4"),
            key_end=np.cumsum([len(key) for key in self._keys], dtype=np.uint64).astype("<u4"),
            extension=columns[:, 3].astype("<u2"),
            keys=b"".join(self._keys),
        )


def sample_names(index: ShardIndex) -> Iterator[str]:
    """The keys of all samples, in order."""
    return (index.key(sample) for sample in range(len(index)))
