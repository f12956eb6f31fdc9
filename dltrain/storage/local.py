"""Files of this host."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dltrain.errors import UserError
from dltrain.storage.base import ObjectNotFound


class LocalStore:
    """Plain files; a write goes to a temporary name in the same folder and is renamed."""

    def size(self, path: str) -> int:
        return self._file(path).stat().st_size

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        with self._file(path).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def write(self, path: str, data: bytes) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None

    def listing(self, path: str) -> list[str]:
        return sorted(str(file) for file in Path(path).rglob("*") if file.is_file())

    @staticmethod
    def _file(path: str) -> Path:
        file = Path(path)
        if not file.is_file():
            raise ObjectNotFound(f"there is no file {path}")
        return file
