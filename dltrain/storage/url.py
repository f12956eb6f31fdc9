"""From a URL to the store that holds it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dltrain.errors import UserError
from dltrain.storage.base import ObjectNotFound, Store
from dltrain.storage.local import LocalStore
from dltrain.storage.memory import MemoryStore


def read(url: str, start: int = 0, stop: int | None = None) -> bytes | bytearray:
    """Bytes ``[start, stop)`` of the object, to its end by default; fewer where it ends before ``stop``."""
    store, path = _open(url)
    return store.read(path, start, stop)


def write(url: str, data: bytes) -> None:
    """Create or replace the object; readers see the old one or the new one, never a part."""
    store, path = _open(url)
    store.write(path, data)


def size(url: str) -> int:
    """Bytes of the object."""
    store, path = _open(url)
    return store.size(path)


def exists(url: str) -> bool:
    """Whether there is such an object (a folder is none)."""
    try:
        size(url)
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
    raise UserError(f"no store for {scheme}:// URLs; there are file://, s3:// and memory://")
