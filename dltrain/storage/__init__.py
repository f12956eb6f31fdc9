"""Objects by URL: ``file://`` (or a plain path), ``s3://``, ``http(s)://`` and ``memory://``.

The same verbs for every scheme; a write is seen whole or not at all, and a read is whole or an error.

    storage.write("s3://bucket/notes.txt", b"...")
    head = storage.read("s3://bucket/notes.txt", 0, 512)
"""

from dltrain.storage.base import Cancelled
from dltrain.storage.ranges import cancelled_by
from dltrain.storage.settings import configure
from dltrain.storage.url import (
    create,
    delete,
    exists,
    is_remote,
    join,
    listing,
    local_path,
    open_object,
    read,
    read_into,
    size,
    stat,
    upload,
    write,
)

__all__ = [
    "Cancelled",
    "cancelled_by",
    "configure",
    "create",
    "delete",
    "exists",
    "is_remote",
    "join",
    "listing",
    "local_path",
    "open_object",
    "read",
    "read_into",
    "size",
    "stat",
    "upload",
    "write",
]
