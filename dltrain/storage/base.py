"""What every store offers, and the one error that callers tell apart."""

from __future__ import annotations

from typing import Protocol

from dltrain.errors import UserError


class ObjectNotFound(UserError):
    """There is no object of that name."""


class Store(Protocol):
    """Objects of one scheme. ``path`` is the URL without its scheme."""

    def size(self, path: str) -> int:
        """Bytes of the object. Raises :class:`ObjectNotFound`."""
        ...

    def read(self, path: str, start: int, stop: int | None) -> bytes | bytearray:
        """Bytes ``[start, stop)``, fewer where the object ends before ``stop``. Raises :class:`ObjectNotFound`."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Create or replace the object at once."""
        ...

    def listing(self, path: str) -> list[str]:
        """Paths of all objects below ``path``, sorted."""
        ...
