"""What every store offers, and the errors that callers tell apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dltrain.errors import UserError


class ObjectNotFound(UserError):
    """There is no object of that name."""


class ObjectChanged(UserError):
    """The object was overwritten while it was being read."""


class Interrupted(Exception):
    """A request failed in a way that another try may mend. ``throttled``: the server asked for fewer requests."""

    def __init__(self, reason: str, throttled: bool = False) -> None:
        super().__init__(reason)
        self.throttled = throttled


class Cancelled(Exception):
    """A read that nobody waits for any more (see :func:`dltrain.storage.cancelled_by`)."""


class PastTheEnd(Exception):
    """The range begins at or behind the object's last byte."""


@dataclass(frozen=True)
class ObjectInfo:
    """Bytes of an object, and the tag that changes when its content does ('' where a store has none)."""

    size: int
    etag: str = ""


class Body(Protocol):
    """The answer to one ranged request: bytes that arrive in order."""

    info: ObjectInfo
    """Of the whole object, whatever range was asked for."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill the front of ``buffer``; the bytes written, 0 at the end. Raises :class:`Interrupted`."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


class RemoteStore(Protocol):
    """A store behind a network: it answers single requests, and says which failures are worth another try."""

    def stat(self, path: str) -> ObjectInfo: ...

    def open(self, path: str, start: int, stop: int | None, etag: str) -> Body:
        """Ask for bytes ``[start, stop)``, of the object tagged ``etag`` where that is given.

        Raises :class:`Interrupted`, :class:`PastTheEnd`, :class:`ObjectNotFound`, :class:`ObjectChanged`.
        """
        ...

    def url(self, path: str) -> str:
        """The URL of ``path``, for messages."""
        ...

    def unreachable(self, path: str, reason: str) -> UserError:
        """The sentence for a request given up on."""
        ...


class Store(Protocol):
    """Objects of one scheme. ``path`` is the URL without its scheme."""

    def stat(self, path: str) -> ObjectInfo:
        """Size and tag. Raises :class:`ObjectNotFound`."""
        ...

    def read(self, path: str, start: int, stop: int | None) -> bytes | bytearray:
        """Bytes ``[start, stop)``, fewer where the object ends before ``stop``. Raises :class:`ObjectNotFound`."""
        ...

    def read_into(self, path: str, start: int, buffer: memoryview, etag: str) -> int:
        """Fill ``buffer`` from byte ``start``; the bytes there were. ``etag`` as in :meth:`RemoteStore.open`."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace the object at once."""
        ...

    def upload(self, file: Path, path: str) -> None:
        """Create or replace the object from a local file, which may be moved."""
        ...

    def delete(self, path: str) -> None:
        """Remove the object; nothing happens where there is none."""
        ...

    def listing(self, path: str) -> list[str]:
        """Paths of all objects below ``path``, sorted."""
        ...
