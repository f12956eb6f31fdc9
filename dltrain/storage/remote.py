"""The verbs that every remote store has in common: reading is by ranges, whatever the protocol below."""

from __future__ import annotations

from dltrain.storage.base import RemoteStore
from dltrain.storage.ranges import Reading, read_whole


class RangedReads:
    """Adds ``read`` and ``read_into`` to a :class:`RemoteStore`."""

    def read(self: RemoteStore, path: str, start: int, stop: int | None) -> bytes | bytearray:
        if stop is None:
            if not start:
                return read_whole(self, path)
            stop = self.stat(path).size
        if stop <= start:
            return b""
        data = bytearray(stop - start)
        got = Reading(self, path, start, memoryview(data)).run()
        return data if got == len(data) else data[:got]

    def read_into(self: RemoteStore, path: str, start: int, buffer: memoryview, etag: str) -> int:
        return Reading(self, path, start, buffer, etag).run()
