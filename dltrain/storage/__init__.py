"""Objects by URL: ``file://`` (or a plain path), ``s3://`` and ``memory://``.

Four verbs, the same for every scheme; a write is seen whole or not at all.

    storage.write("s3://bucket/notes.txt", b"...")
    head = storage.read("s3://bucket/notes.txt", 0, 512)
"""

from dltrain.storage.url import exists, join, listing, read, size, write

__all__ = ["exists", "join", "listing", "read", "size", "write"]
