"""Files of this host."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dltrain.errors import UserError
from dltrain.storage.base import ObjectInfo, ObjectNotFound


class LocalStore:
    """Plain files; a write goes to a temporary name in the same folder and is renamed."""

    def stat(self, path: str) -> ObjectInfo:
        return ObjectInfo(self._file(path).stat().st_size)

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        with self._file(path).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def read_into(self, path: str, start: int, buffer: memoryview, etag: str) -> int:
        with self._file(path).open("rb") as file:
            file.seek(start)
            return file.readinto(buffer)

    def write(self, path: str, data: bytes) -> None:
        with self.create(path) as file:
            file.write(data)

    def upload(self, file: Path, path: str) -> None:
        with file.open("rb") as source, self.create(path) as target:
            shutil.copyfileobj(source, target, 16 << 20)

    def delete(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def listing(self, path: str) -> list[str]:
        return sorted(str(file) for file in Path(path).rglob("*") if file.is_file())

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """A file beside the target, which takes its name when the block ends, and is removed if it fails."""
        target, temporary = Path(path), ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        finally:
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def _file(path: str) -> Path:
        file = Path(path)
        try:
            if not file.is_file():
                raise ObjectNotFound(f"there is no file {path}")
            if not os.access(file, os.R_OK):
                raise UserError(f"cannot read {path}: permission denied")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return file
