"""Writing shards: webdataset tars with an index each, and the manifest when all are done.

Bytes are deterministic: the same samples give the same tar, so that a data set built twice has one fingerprint. A shard
goes to a local file while it is written and appears at its URL whole; memory is one sample and the shard's index.

    with ShardWriter("s3://bucket/digits/train", samples_per_shard=256, facts={"classes": 10}) as writer:
        writer.write("0001", {"png": png_bytes, "cls": b"7"})
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import google_crc32c

from dltrain import storage
from dltrain.data.formats import tar
from dltrain.data.formats.tape import Scan
from dltrain.data.index import IndexBuilder
from dltrain.data.manifest import NAME, Manifest, ShardInfo
from dltrain.errors import UserError

BYTES_PER_SHARD = 256 << 20
"""Large enough that a shard's read is not ruled by its first byte, small enough to hold several in memory."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Limits:
    """The most of one shard: samples, where there is a limit, and bytes."""

    samples: int | None = None
    bytes: int = BYTES_PER_SHARD

    def __post_init__(self) -> None:
        if self.bytes < 1 or (self.samples is not None and self.samples < 1):
            raise UserError(f"a shard of {self.samples} samples, {self.bytes} bytes holds nothing; give more")


class ShardWriter:
    """Packs samples into shards of at most ``samples_per_shard`` samples and ``bytes_per_shard`` bytes.

    A sample larger than that has a shard of its own. A key may not come twice in a shard; that it comes once in the
    data set, ``dltrain shards verify`` checks, for keys of a whole data set need not fit in memory.
    """

    def __init__(
        self,
        url: str,
        *,
        samples_per_shard: int | None = None,
        bytes_per_shard: int = BYTES_PER_SHARD,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_existing(url)
        self._url, self._facts = url, dict(facts or {})
        self._shards: list[ShardInfo] = []
        self._packer = Packer(url, "shard-{:06d}.tar", Limits(samples_per_shard, bytes_per_shard))

    def write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Add one sample. ``fields`` are bytes by extension. Raises :class:`UserError` for a key the shard has."""
        full = self._packer.write(key, fields)
        self._shards += [full] if full else []

    def close(self) -> Manifest:
        """Write what is left and the manifest."""
        last = self._packer.finish()
        self._shards += [last] if last else []
        manifest = Manifest(self._url, tuple(self._shards), self._facts)
        manifest.save()
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._packer.discard(error)


class Packer:
    """Samples into shards, each called ``name.format(number)`` with numbers from ``first``."""

    def __init__(self, url: str, name: str, limits: Limits, first: int = 0) -> None:
        self._url, self._name, self._limits, self._number = url, name, limits, first
        self._shard: TarShard | None = None

    def write(self, key: str, fields: Mapping[str, bytes]) -> ShardInfo | None:
        """Add a sample; returns the shard before it, published, where the sample begins a new one."""
        check_sample(key, fields)
        full = None
        if self._shard is not None and not self._shard.has_room(fields, self._limits):
            full = self.finish()
        if self._shard is None:
            self._shard = TarShard(self._url, self._name.format(self._number))
        self._shard.write(key, fields)
        return full

    def finish(self) -> ShardInfo | None:
        """Publish the shard at hand, if there is one."""
        if self._shard is None:
            return None
        shard, self._shard = self._shard, None
        self._number += 1
        return shard.publish()

    def discard(self, error: BaseException) -> None:
        """Write nothing more: the shard at hand is part of a work that failed."""
        if self._shard is not None:
            self._shard.discard(error)


class TarShard:
    """One shard being written to a local file; :meth:`publish` puts it and its index at their URLs."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name
        self._stack = ExitStack()
        self._file = self._stack.enter_context(storage.create(storage.join(url, name)))
        self._index = IndexBuilder()
        self._keys: set[str] = set()
        self._bytes = self._crc32c = 0

    def has_room(self, fields: Mapping[str, bytes], limits: Limits) -> bool:
        """Whether the sample fits below the limits; the first one always does."""
        if not self._keys:
            return True
        packed = self._bytes + sum(tar.BLOCK + len(data) + -len(data) % tar.BLOCK for data in fields.values())
        fits = packed + len(tar.end(packed)) <= limits.bytes
        return fits and (limits.samples is None or len(self._keys) < limits.samples)

    def write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Add a checked sample. Raises :class:`UserError` where the shard has one of this key."""
        if key in self._keys:
            raise UserError(f"sample {key!r} is already written; each sample needs a key of its own")
        self._keys.add(key)
        for extension, data in fields.items():
            self._write(tar.header(f"{key}.{extension}", len(data)))
            self._index.add(key, extension, self._bytes, len(data), google_crc32c.value(data))
            self._write(data)
            self._write(bytes(-len(data) % tar.BLOCK))

    def publish(self) -> ShardInfo:
        """Write the end, the tar and then its index; returns the manifest's line."""
        self._write(tar.end(self._bytes))
        self._stack.close()
        return publish_index(self._url, self._name, Scan(self._index.build(), self._bytes, self._crc32c))

    def discard(self, error: BaseException) -> None:
        """Write nothing: what has been collected is part of a work that failed."""
        self._stack.__exit__(type(error), error, error.__traceback__)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._bytes += len(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)


def refuse_existing(url: str) -> None:
    """Raise :class:`UserError` where a data set lies already."""
    if storage.exists(storage.join(url, NAME)):
        raise UserError(f"there is a data set at {url}; write to another URL, or remove it first")


def check_sample(key: str, fields: Mapping[str, bytes]) -> None:
    """Raise :class:`UserError` unless every reader of webdataset's tars finds this key and these fields again."""
    if not isinstance(key, str) or not key or "." in key.rpartition("/")[2] or key[0] == "/" or _CONTROL.search(key):
        raise UserError(f"sample key {key!r} is no name; a key is text without dots, not beginning with a slash")
    if not fields or not all(isinstance(data, bytes) for data in fields.values()):
        raise UserError(f"sample {key!r} has fields {fields!r:.60}; give bytes by extension: {{'cls': b'3'}}")
    for extension in fields:
        if tar.split_name(f"{key}.{extension}") != (key, extension) or not extension or _CONTROL.search(extension):
            raise UserError(
                f"{key}.{extension} would not be read as field {extension!r} of sample {key!r}; keys are names "
                "without dots that do not begin with two underscores, fields are lower-case extensions"
            )


def publish_index(url: str, name: str, scan: Scan, where: str = "", format: str = "tar") -> ShardInfo:
    """Write the index of the shard ``name`` to the folder ``url``; returns the manifest's line."""
    encoded = scan.index.to_bytes()
    storage.write(storage.join(url, f"{name}.idx"), encoded)
    return ShardInfo(
        name=name,
        samples=len(scan.index),
        bytes=scan.bytes,
        crc32c=scan.crc32c,
        index=f"{name}.idx",
        index_bytes=len(encoded),
        index_crc32c=google_crc32c.value(encoded),
        format=format,
        url=where,
    )
