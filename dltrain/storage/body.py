"""The body of an HTTP answer, read straight into a buffer."""

from __future__ import annotations

import re
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from dltrain.storage.base import Interrupted, ObjectInfo

_PIECE = 1 << 20
"""Bytes of one read: large enough to be cheap, small enough that a cut loses no time."""


class HTTPBody:
    """A streaming answer of urllib3, on which botocore rests too."""

    def __init__(self, answer: urllib3.BaseHTTPResponse, info: ObjectInfo) -> None:
        self.info = info
        self._answer = answer
        self._direct = _unbuffered(answer)

    def readinto(self, buffer: memoryview) -> int:
        try:
            if self._direct is not None:
                return int(self._direct(buffer[:_PIECE]))
            data = self._answer.read(min(len(buffer), _PIECE))
        except (HTTPError, OSError) as error:
            raise Interrupted(f"{type(error).__name__}") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """The connection serves the next request if this answer was read to its end, and is closed otherwise."""
        try:
            if self._direct is not None and self._answer._fp.isclosed():  # type: ignore[attr-defined]
                self._answer.release_conn()
            else:
                self._answer.close()
        except (HTTPError, OSError):  # the peer has gone: there is nothing to give back
            self._answer.release_conn()


def whole_size(content_range: str, content_length: int) -> int | None:
    """Bytes of the whole object, from the headers of a ranged or a full answer; None where they do not tell."""
    if content_range:
        found = re.fullmatch(r"bytes \S+/(\d+)", content_range)
        return int(found[1]) if found else None
    return content_length if content_length >= 0 else None


def _unbuffered(answer: urllib3.BaseHTTPResponse) -> Any:
    """http.client's own ``readinto`` under urllib3's answer, which saves two copies; None where bytes are encoded."""
    below: Any = getattr(answer, "_fp", None)
    plain = not answer.headers.get("Content-Encoding") and not answer.headers.get("Transfer-Encoding")
    return below.readinto if plain and hasattr(below, "readinto") else None
