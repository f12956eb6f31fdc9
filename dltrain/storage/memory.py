"""Objects in this process's memory: for tests and examples, not shared between ranks."""

from __future__ import annotations

from pathlib import Path

from dltrain.storage.base import ObjectInfo, ObjectNotFound


class MemoryStore:
    """A dictionary of bytes by path."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(len(self.read(path, 0, None)))

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        if path not in self._objects:
            raise ObjectNotFound(f"there is no object memory://{path}")
        return self._objects[path][start:stop]

    def read_into(self, path: str, start: int, buffer: memoryview, etag: str) -> int:
        data = self.read(path, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, path: str, data: bytes) -> None:
        self._objects[path] = bytes(data)

    def upload(self, file: Path, path: str) -> None:
        self._objects[path] = file.read_bytes()

    def delete(self, path: str) -> None:
        self._objects.pop(path, None)

    def listing(self, path: str) -> list[str]:
        return sorted(name for name in self._objects if name.startswith(path.rstrip("/") + "/"))
