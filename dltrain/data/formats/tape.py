"""A file read once, from its front to its end, with the checksum of all that went by.

tape = Tape(storage.open_object(url), url)
header = tape.take(512)
print(tape.position, tape.crc32c)
"""

from __future__ import annotations

import lzma
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

from dltrain.data.index import ShardIndex
from dltrain.errors import UserError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard's file gives: its index, and bytes and crc32c of the whole."""

    index: ShardIndex
    bytes: int
    crc32c: int


class Tape:
    """Bytes in order. ``where`` names the file in messages, ``last`` what was being read."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self.where = where
        self.last = ""
        self.position = 0
        """Bytes read so far."""
        self.crc32c = 0
        """Of all bytes read so far."""

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes. Raises :class:`UserError` where the file ends before."""
        data = self.take_up_to(size)
        if len(data) < size:
            raise self.error(f"is truncated: it ends at byte {self.position}{self.after()}")
        return data

    def take_up_to(self, size: int) -> bytes:
        """The next bytes, fewer than ``size`` only at the end of the file."""
        try:
            data = self._file.read(size)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:  # what decompression raises
            raise self.error(f"cannot be read on from byte {self.position}{self.after()}: {error}") from None
        self.position += len(data)
        self.crc32c = google_crc32c.extend(self.crc32c, data)
        return data

    def skip(self, size: int) -> None:
        """Pass over bytes, at most 1 MiB of them in memory."""
        while size:
            size -= len(self.take(min(size, CHUNK)))

    def checksum(self, size: int) -> int:
        """The crc32c of the next ``size`` bytes, at most 1 MiB of them in memory."""
        crc32c = 0
        while size:
            data = self.take(min(size, CHUNK))
            crc32c = google_crc32c.extend(crc32c, data)
            size -= len(data)
        return crc32c

    def after(self) -> str:
        return f", after or in {self.last}" if self.last else ""

    def error(self, what: str) -> UserError:
        return UserError(f"{self.where} {what}")
