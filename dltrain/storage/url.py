"""From a URL to the store that holds it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

from dltrain.errors import UserError
from dltrain.storage.base import ObjectInfo, ObjectNotFound, Store
from dltrain.storage.file import ObjectFile
from dltrain.storage.local import LocalStore
from dltrain.storage.memory import MemoryStore


def read(url: str, start: int = 0, stop: int | None = None) -> bytes | bytearray:
    """Bytes ``[start, stop)`` of the object, to its end by default; fewer where it ends before ``stop``."""
    store, path = _open(url)
    return store.read(path, start, stop)


def read_into(url: str, start: int, buffer: memoryview, etag: str = "") -> int:
    """Fill ``buffer`` with the bytes from ``start``, in parallel parts; returns how many the object had.

    With ``etag`` (of :func:`stat`) an object overwritten meanwhile raises
    :class:`~dltrain.storage.base.ObjectChanged`; without it, one overwritten during the read does.
    """
    store, path = _open(url)
    return store.read_into(path, start, buffer, etag)


def write(url: str, data: bytes) -> None:
    """Create or replace the object; readers see the old one or the new one, never a part."""
    store, path = _open(url)
    store.write(path, data)


def upload(file: Path, url: str) -> None:
    """Create or replace the object from a local file, in parts where it is large; all at once for readers."""
    store, path = _open(url)
    store.upload(file, path)


@contextmanager
def create(url: str) -> Iterator[BinaryIO]:
    """A local file to write into, which becomes the object when the block ends, and nothing if it fails."""
    store, path = _open(url)
    if isinstance(store, LocalStore):
        with store.create(path) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(prefix="dltrain-") as temporary:
        yield cast(BinaryIO, temporary)
        temporary.flush()
        store.upload(Path(temporary.name), path)


def open_object(url: str, ahead: int = 32 << 20) -> BinaryIO:
    """The object as a seekable binary file, read ``ahead`` bytes at a time by parallel parts."""
    store, path = _open(url)
    if isinstance(store, LocalStore):
        return store._file(path).open("rb")
    return cast(BinaryIO, io.BufferedReader(ObjectFile(store, path), ahead))


def delete(url: str) -> None:
    """Remove the object, if there is one."""
    store, path = _open(url)
    store.delete(path)


def stat(url: str) -> ObjectInfo:
    """Size in bytes, and the tag that changes with the content."""
    store, path = _open(url)
    return store.stat(path)


def size(url: str) -> int:
    """Bytes of the object."""
    return stat(url).size


def exists(url: str) -> bool:
    """Whether there is such an object (a folder is none)."""
    try:
        stat(url)
    except ObjectNotFound:
        return False
    return True


def listing(url: str) -> list[str]:
    """URLs of all objects below ``url``, sorted."""
    store, path = _open(url)
    scheme = url.partition("://")[0] + "://" if "://" in url else ""
    return [scheme + name for name in store.listing(path)]


def join(url: str, name: str) -> str:
    """The URL of ``name`` in the folder ``url``."""
    return f"{url.rstrip('/')}/{name}"


def local_path(url: str) -> Path | None:
    """The file of this host that the URL names, or None for an object elsewhere."""
    store, path = _open(url)
    return Path(path) if isinstance(store, LocalStore) else None


def is_remote(url: str) -> bool:
    """Whether the object lies behind a network, so that keeping a copy of it pays."""
    return url.partition("://")[0] in ("s3", "http", "https")


def _open(url: str) -> tuple[Store, str]:
    scheme, separator, path = url.partition("://")
    if not separator:
        return _store("file"), str(Path(url).expanduser())
    if scheme == "file":
        path = str(Path(path).expanduser())
    return _store(scheme), path


@cache
def _store(scheme: str) -> Store:
    if scheme == "file":
        return LocalStore()
    if scheme == "memory":
        return MemoryStore()
    if scheme == "s3":
        from dltrain.storage.s3 import S3Store  # boto3 is slow to import and not needed for local files

        return S3Store()
    if scheme in ("http", "https"):
        from dltrain.storage.http import HTTPStore  # nor is urllib3

        return HTTPStore(scheme)
    raise UserError(f"no store for {scheme}:// URLs; there are file://, s3://, http://, https:// and memory://")
