"""Objects in this process's memory: for tests and examples, not shared between ranks."""

from __future__ import annotations

from dltrain.storage.base import ObjectNotFound


class MemoryStore:
    """A dictionary of bytes by path."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def size(self, path: str) -> int:
        return len(self.read(path, 0, None))

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        if path not in self._objects:
            raise ObjectNotFound(f"there is no object memory://{path}")
        return self._objects[path][start:stop]

    def write(self, path: str, data: bytes) -> None:
        self._objects[path] = bytes(data)

    def listing(self, path: str) -> list[str]:
        return sorted(name for name in self._objects if name.startswith(path.rstrip("/") + "/"))
