"""Writing shards: webdataset tars with an index each, and the manifest when all are done.

Bytes are deterministic: the same samples give the same tar, so that a data set built twice has one fingerprint.

    with ShardWriter("s3://bucket/digits/train", samples_per_shard=256, facts={"classes": 10}) as writer:
        writer.write("0001", {"png": png_bytes, "cls": b"7"})
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import google_crc32c

from dltrain import storage
from dltrain.data.index import scan
from dltrain.data.manifest import NAME, Manifest, ShardInfo
from dltrain.errors import UserError


class ShardWriter:
    """Collects samples into shards of at most ``samples_per_shard`` samples or ``bytes_per_shard`` bytes."""

    def __init__(
        self,
        url: str,
        *,
        samples_per_shard: int = 10_000,
        bytes_per_shard: int = 256 << 20,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise UserError(f"a shard of {samples_per_shard} samples, {bytes_per_shard} bytes holds nothing; give more")
        if storage.exists(storage.join(url, NAME)):
            raise UserError(f"there is a data set at {url}; write to another URL, or remove it first")
        self._url = url
        self._limits = (samples_per_shard, bytes_per_shard)
        self._facts = dict(facts or {})
        self._shards: list[ShardInfo] = []
        self._seen: set[str] = set()
        self._open_tar()

    def write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Add one sample. ``fields`` are bytes by extension. Raises :class:`UserError` for a key used before."""
        self._check(key, fields)
        self._seen.add(key)
        for extension, data in fields.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            info.mode = 0o444
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1
        if self._samples >= self._limits[0] or self._buffer.tell() >= self._limits[1]:
            self._close_shard()
            self._open_tar()

    def _check(self, key: str, fields: Mapping[str, bytes]) -> None:
        if not isinstance(key, str) or not key or "." in key or key.startswith("/"):
            raise UserError(f"sample key {key!r} is no name; a key is text without dots, not beginning with a slash")
        if key in self._seen:
            raise UserError(f"sample {key!r} is already written; each sample needs a key of its own")
        if not fields or not all(isinstance(data, bytes) for data in fields.values()):
            raise UserError(f"sample {key!r} has fields {fields!r:.60}; give bytes by extension: {{'cls': b'3'}}")
        if any(len(f"{key}.{extension}".encode()) > 100 for extension in fields):
            raise UserError(f"sample key {key[:40]!r}... is over a tar's 100 bytes with its extension; shorten it")

    def close(self) -> Manifest:
        """Write what is left and the manifest."""
        if self._samples:
            self._close_shard()
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

    def _open_tar(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._samples = 0

    def _close_shard(self) -> None:
        self._tar.close()
        data = self._buffer.getvalue()
        name = f"shard-{len(self._shards):06d}.tar"
        self._shards.append(publish_shard(self._url, name, data))


def publish_shard(url: str, name: str, data: bytes, write_tar: bool = True) -> ShardInfo:
    """Write a tar (unless it lies there already) and its index; returns the manifest's line."""
    index = scan(data, storage.join(url, name))
    encoded = index.to_bytes()
    if write_tar:
        storage.write(storage.join(url, name), data)
    storage.write(storage.join(url, f"{name}.idx"), encoded)
    return ShardInfo(
        name=name,
        samples=len(index),
        bytes=len(data),
        crc32c=google_crc32c.value(data),
        index=f"{name}.idx",
        index_bytes=len(encoded),
        index_crc32c=google_crc32c.value(encoded),
    )
