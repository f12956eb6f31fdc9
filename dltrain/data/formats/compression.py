"""Compressed files, as a stream: for reading through once, for nothing in them can be addressed.

with open_stream("s3://bucket/digits/shard-000000.tar.gz") as file:
    samples = list(read_samples(file, "..."))
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import BinaryIO, cast

from dltrain import storage
from dltrain.errors import UserError

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")


def compression_of(head: bytes) -> str:
    """The name of the compression a file with these first bytes has, or ''."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def open_stream(url: str) -> BinaryIO:
    """The object's content from its front, decompressed where it is compressed."""
    file = storage.open_object(url)
    kind = compression_of(file.read(6))
    file.seek(0)
    if kind == "gzip":
        return cast(BinaryIO, gzip.open(file))
    if kind == "bzip2":
        return cast(BinaryIO, bz2.open(file))
    if kind == "xz":
        return cast(BinaryIO, lzma.open(file))
    return _open_zstd(file, url) if kind == "zstd" else file


def open_addressable(url: str) -> BinaryIO:
    """The object itself. Raises :class:`UserError` where it is compressed."""
    file = storage.open_object(url)
    kind = compression_of(file.read(6))
    if kind:
        file.close()
        raise UserError(
            f"{url} is compressed ({kind}), so that no part of it can be read alone; "
            "write it as shards with: dltrain shards convert"
        )
    file.seek(0)
    return file


def _open_zstd(file: BinaryIO, url: str) -> BinaryIO:
    try:
        import pyarrow  # large, and Python has no zstd before 3.14
    except ImportError:
        raise UserError(f"{url} is compressed with zstd, which needs pyarrow: pip install 'dltrain[formats]'") from None
    return cast(BinaryIO, pyarrow.CompressedInputStream(file, "zstd"))
