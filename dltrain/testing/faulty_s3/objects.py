"""Buckets as folders, objects as files: ``folder/bucket/key``, so that what lies there already is served as it is.

An object is replaced by a rename: who is reading the old one reads it to its end. ETags and headers of what was PUT are
kept in memory; other files get an ETag of their size and time. Unlike in S3, ``a`` and ``a/b`` cannot both be objects,
and no part of a key between two ``/`` may be longer than a file's name.

    objects = Objects(Path("/data"))
    stored, file = objects.open("bucket", "train/00000.tar")
    print(stored.size, stored.etag)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Self

from dltrain.testing.faulty_s3.wire import Pacing, Request, S3Error

_PIECE = 1 << 20
_ESCAPED = {"": "%2F", ".": "%2E", "..": "%2E%2E"}
"""Parts of a key that a file cannot be named, and the files' names."""
_PARTS = {name: part for part, name in _ESCAPED.items()}
_BUCKET = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Stored:
    """An object's facts; ``headers`` are those of its PUT that S3 gives back."""

    size: int
    modified: float
    etag: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Received:
    """A body that has arrived, in a file of its own."""

    path: Path
    md5: str = ""
    """In hexadecimal; of a whole made of parts, as S3 writes the ETag of one."""
    crc32: int = 0


class Objects:
    """All buckets below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[tuple[int, ...], Stored]] = {}
        self._replaced: dict[Path, Path] = {}
        self._numbers = count()
        self._lock = Lock()

    def __enter__(self) -> Self:
        self._scratch_folder = _scratch_folder(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._scratch_folder, ignore_errors=True)

    def create_bucket(self, bucket: str) -> None:
        """Raises ``S3Error`` for a name that is none of a bucket."""
        if not _BUCKET.fullmatch(bucket):
            raise S3Error(400, "InvalidBucketName", "The specified bucket is not valid.")
        (self.folder / bucket).mkdir(exist_ok=True)

    def check_bucket(self, bucket: str) -> None:
        """Raise ``S3Error`` unless it exists."""
        if not _BUCKET.fullmatch(bucket) or not (self.folder / bucket).is_dir():
            raise S3Error(404, "NoSuchBucket", "The specified bucket does not exist")

    def stat(self, bucket: str, key: str) -> Stored:
        """Raises ``S3Error`` where there is no such object."""
        stored, file = self.open(bucket, key)
        file.close()
        return stored

    def open(self, bucket: str, key: str) -> tuple[Stored, FileIO]:
        """The object and its file, which stays the same whatever happens to the key. Raises ``S3Error``."""
        self.check_bucket(bucket)
        path = self._path(bucket, key)
        try:
            file = FileIO(self._replaced.get(path, path))
        except _NO_FILE:
            raise S3Error(404, "NoSuchKey", "The specified key does not exist.") from None
        except PermissionError:
            raise S3Error(403, "AccessDenied", "The server may not read the object's file.") from None
        return self._stored(path, os.fstat(file.fileno())), file

    @contextmanager
    def receiving(self, request: Request, pacing: Pacing) -> Iterator[Received]:
        """A request's body in a file, which goes at the end unless it was moved. Raises ``ConnectionError``."""
        received = Received(self.scratch())
        if request.method not in ("PUT", "POST"):
            request.body.read()
            yield received
            return
        try:
            with received.path.open("wb") as file:
                _copy(request.body, file, received, pacing)
            yield received
        finally:
            received.path.unlink(missing_ok=True)

    def put(self, bucket: str, key: str, received: Received, headers: dict[str, str], new: bool = False) -> Stored:
        """Make what was received the object; its file goes. Raises ``S3Error``, also if it must be ``new`` and is not.

        ``headers`` are kept with it.
        """
        self.check_bucket(bucket)
        path = self._path(bucket, key)
        facts = received.path.stat()
        stored = Stored(facts.st_size, facts.st_mtime, f'"{received.md5}"', headers)
        with self._lock:
            if new and path.is_file():
                raise S3Error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")
            _move(received.path, path)
            self._replaced.pop(path, None)
            self._known[path] = (_identity(facts), stored)
        return stored

    def delete(self, bucket: str, key: str) -> None:
        """Remove the object, if there is one, and the folders it leaves empty."""
        self.check_bucket(bucket)
        path = self._path(bucket, key)
        with self._lock, suppress(*_NO_FILE):
            path.unlink()
            self._known.pop(path, None)
            self._replaced.pop(path, None)
            with suppress(OSError):  # the first that is not empty
                for parent in path.relative_to(self.folder / bucket).parents:
                    if parent.parts:
                        (self.folder / bucket / parent).rmdir()

    def invert(self, bucket: str, key: str) -> None:
        """Replace the object by one of the same size and other bytes; the file in the folder stays as it is."""
        table, copy = bytes(255 - byte for byte in range(256)), self.scratch()
        with self.open(bucket, key)[1] as file, copy.open("wb") as target:
            while data := file.read(_PIECE):
                target.write(data.translate(table))
        self._replaced[self._path(bucket, key)] = copy

    def keys(self, bucket: str, prefix: str) -> list[str]:
        """All keys that begin with ``prefix``, in S3's order. Raises ``S3Error``."""
        self.check_bucket(bucket)
        root, above = self.folder / bucket, prefix.rpartition("/")[0]
        found = []
        for folder, _, files in os.walk(self._path(bucket, above) if above else root, followlinks=True):
            parts = Path(folder).relative_to(root).parts
            found += ["/".join(_PARTS.get(part, part) for part in (*parts, name)) for name in files]
        return sorted(key for key in found if key.startswith(prefix))

    def scratch(self) -> Path:
        """Where a new file may be written; beside the buckets, so that a rename moves it into one."""
        return self._scratch_folder / str(next(self._numbers))

    def _path(self, bucket: str, key: str) -> Path:
        parts = [_ESCAPED.get(part, part) for part in key.split("/")]
        if "\0" in key or any(len(part.encode()) > 255 for part in parts):
            raise S3Error(400, "KeyTooLongError", "This server keeps no key with a part that no file can be named.")
        return Path(self.folder, bucket, *parts)

    def _stored(self, path: Path, facts: os.stat_result) -> Stored:
        identity, stored = self._known.get(path, ((), None))
        if stored and identity == _identity(facts):
            return stored
        etag = hashlib.md5(repr(_identity(facts)).encode(), usedforsecurity=False).hexdigest()
        return Stored(facts.st_size, facts.st_mtime, f'"{etag}"')


@dataclass
class Upload:
    """A multipart upload under way."""

    bucket: str
    key: str
    headers: dict[str, str]
    parts: dict[int, Received] = field(default_factory=dict)


class Uploads:
    """Multipart uploads: nothing of one is seen before it is completed."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._uploads: dict[str, Upload] = {}
        self._numbers = count(1)

    def create(self, bucket: str, key: str, headers: dict[str, str]) -> str:
        """The id of a new upload. Raises ``S3Error``."""
        self._objects.check_bucket(bucket)
        name = f"upload-{next(self._numbers)}"
        self._uploads[name] = Upload(bucket, key, headers)
        return name

    def unfinished(self) -> list[tuple[str, str]]:
        """Bucket and key of each."""
        return [(upload.bucket, upload.key) for upload in list(self._uploads.values())]

    def part(self, name: str, number: int, received: Received) -> str:
        """Add a part, whose file goes; its ETag. Raises ``S3Error``."""
        upload, kept = self._find(name), self._objects.scratch()
        os.replace(received.path, kept)
        upload.parts[number] = Received(kept, received.md5)
        return f'"{received.md5}"'

    def complete(self, name: str, parts: Sequence[tuple[int, str]]) -> Stored:
        """Make the object of the parts named by number and ETag. Raises ``S3Error``."""
        upload = self._find(name)
        numbers = [number for number, _ in parts]
        if not parts or numbers != sorted(set(numbers)):
            raise S3Error(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
        if any(number not in upload.parts or upload.parts[number].md5 != etag.strip('"') for number, etag in parts):
            raise S3Error(400, "InvalidPart", "One or more of the specified parts could not be found.")
        whole = self._objects.scratch()
        with whole.open("wb") as target:
            for number in numbers:
                with upload.parts[number].path.open("rb") as source:
                    shutil.copyfileobj(source, target, _PIECE)
        digests = b"".join(bytes.fromhex(upload.parts[number].md5) for number in numbers)
        etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(numbers)}"
        stored = self._objects.put(upload.bucket, upload.key, Received(whole, etag), upload.headers)
        self.abort(name)
        return stored

    def abort(self, name: str) -> None:
        """Forget the upload and its parts. Raises ``S3Error``."""
        for part in self._find(name).parts.values():
            part.path.unlink(missing_ok=True)
        del self._uploads[name]

    def _find(self, name: str) -> Upload:
        if name not in self._uploads:
            raise S3Error(404, "NoSuchUpload", "The specified multipart upload does not exist.")
        return self._uploads[name]


def _scratch_folder(folder: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".scratch-", dir=folder))
    except OSError:  # a folder that is only read
        return Path(tempfile.mkdtemp())


def _copy(body: BinaryIO, file: BinaryIO, received: Received, pacing: Pacing) -> None:
    md5, buffer = hashlib.md5(usedforsecurity=False), memoryview(bytearray(_PIECE))
    while length := body.readinto(buffer[: pacing.piece]):  # type: ignore[attr-defined]
        pacing.wait(length)
        file.write(buffer[:length])
        md5.update(buffer[:length])
        received.crc32 = zlib.crc32(buffer[:length], received.crc32)
    received.md5 = md5.hexdigest()


def _move(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    except (*_NO_FILE, FileExistsError):
        raise S3Error(409, "OperationAborted", "This server keeps no object below another's key.") from None
    except OSError as error:
        raise S3Error(403, "AccessDenied", f"The server's folder takes no file: {error.strerror}") from None


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
