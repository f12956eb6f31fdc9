"""What was asked of the server, request by request.

journal = Journal()
record = journal.begin(Record("GET", "data", "a.tar", range="bytes=0-9"))
journal.end(record)
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

_SETTLE_SECONDS = 0.25


@dataclass(slots=True)
class Record:
    """One request."""

    method: str
    """GET, HEAD, PUT, DELETE, POST, or LIST."""
    bucket: str
    key: str
    range: str = ""
    """The header, such as ``bytes=0-9``; '' without one."""
    access_key: str = ""
    """Id of the key that signed; '' for nobody."""
    status: int = 0
    """Of the answer; 0 while there is none."""
    bytes_sent: int = 0
    """Of the answer's body."""
    seconds: float = 0.0
    """From the request's last byte to the answer's; 0 while it lasts."""


class Journal:
    """Records of all requests, in the order they came."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._began: dict[int, float] = {}
        self._changed = threading.Condition()

    def begin(self, record: Record) -> Record:
        """Add a request that has just arrived."""
        with self._changed:
            self._records.append(record)
            self._began[id(record)] = time.monotonic()
        return record

    def end(self, record: Record) -> None:
        """The request has been answered, or never will be."""
        with self._changed:
            began = self._began.pop(id(record), None)
            if began is not None:
                record.seconds = time.monotonic() - began
            self._changed.notify_all()

    def records(self) -> list[Record]:
        """All of them. A client may have its answer a moment before it is noted here: that moment is waited for."""
        with self._changed:
            self._changed.wait_for(lambda: not self._began, timeout=_SETTLE_SECONDS)
            return list(self._records)

    def forget(self) -> None:
        """Begin anew."""
        with self._changed:
            self._changed.wait_for(lambda: not self._began, timeout=_SETTLE_SECONDS)
            self._records.clear()
