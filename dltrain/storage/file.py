"""An object as a file, for libraries that want one."""

from __future__ import annotations

import io
from typing import Any

from dltrain.storage.base import Store


class ObjectFile(io.RawIOBase):
    """Readable and seekable; each ``readinto`` is one read by parallel parts, of the object as it was when opened."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._info = store.stat(path)
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._info.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._info.size - self._place)]
        got = self._store.read_into(self._path, self._place, view, self._info.etag) if len(view) else 0
        self._place += got
        return got
