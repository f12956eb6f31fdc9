"""HTTP as S3 speaks it: requests read from a socket, bodies decoded, answers sent.

Written on sockets since ``http.server`` costs more per request than all the rest; a part of a file goes out by
``sendfile`` and is never copied.

    request = read_request(stream)
    send(connection, Answer(200, {"ETag": '"1"'}, Span(file, 0, 4096)), request.method, on_bytes, throttle)
"""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

_LINE = 1 << 16
_MORE = getattr(socket, "MSG_MORE", 0)
_SIGNER = re.compile(r"(?:Credential=|AWS )([^/:,\s]+)")


class S3Error(Exception):
    """A refusal as S3 words it: HTTP status, code, message."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def answer(self) -> Answer:
        text = f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message></Error>"
        return xml(text, self.status, self.headers)


class Pacing(Protocol):
    """How fast a body may pass."""

    piece: int

    def wait(self, count: int) -> None: ...


@dataclass
class Request:
    """One request: an operation on ``key`` of ``bucket``; '' where there is none."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    """By lower-case name."""
    body: BinaryIO
    """Decoded; to be read to its end before the answer."""
    trailers: dict[str, str]
    """Headers that follow a chunked body, filled when it has been read."""
    keeps_alive: bool

    @property
    def access_key(self) -> str:
        """Id of the key that signed, '' for nobody. The signature is taken as right."""
        found = _SIGNER.match(self.headers.get("authorization", "").removeprefix("AWS4-HMAC-SHA256").lstrip())
        presigned = self.query.get("X-Amz-Credential", "").partition("/")[0] or self.query.get("AWSAccessKeyId", "")
        return found[1] if found else presigned

    @property
    def reads_object(self) -> bool:
        return self.method == "GET" and bool(self.key)

    @property
    def lists(self) -> bool:
        return self.method == "GET" and not self.key


@dataclass(frozen=True)
class Span:
    """Bytes ``[start, start + length)`` of a file, one bit of the middle one flipped if ``flip``."""

    file: io.FileIO
    start: int
    length: int
    flip: bool = False
    cut: int | None = None
    """Bytes after which the connection is closed."""


@dataclass
class Answer:
    """Status, headers, and a body in memory or in a file."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Span = b""

    def close(self) -> None:
        if isinstance(self.body, Span):
            self.body.file.close()


def xml(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """An answer in S3's language."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return Answer(status, {"Content-Type": "application/xml", **(headers or {})}, body)


def read_request(stream: io.BufferedIOBase, more: Callable[[], None]) -> Request | None:
    """The next request of a connection, None at its end; ``more`` asks a waiting client for the body."""
    words = stream.readline(_LINE).decode("latin-1").split()
    if len(words) != 3:  # closed, or not HTTP
        return None
    headers = _headers(stream)
    path, _, query = words[1].partition("?")
    bucket, key = _address(path, headers.get("host", ""))
    if headers.get("expect", "").lower() == "100-continue":
        more()
    trailers: dict[str, str] = {}
    keeps_alive = words[2] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    return Request(words[0], bucket, key, parameters, headers, _body(stream, headers, trailers), trailers, keeps_alive)


def _headers(stream: io.BufferedIOBase) -> dict[str, str]:
    headers = {}
    while line := stream.readline(_LINE).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _address(path: str, host: str) -> tuple[str, str]:
    """Bucket and key, by the path alone or with the bucket in front of ``.localhost``."""
    name = host.partition(":")[0]
    if name.endswith(".localhost"):
        return name.removesuffix(".localhost"), unquote(path[1:])
    bucket, _, key = path[1:].partition("/")
    return unquote(bucket), unquote(key)


def _body(stream: io.BufferedIOBase, headers: dict[str, str], trailers: dict[str, str]) -> BinaryIO:
    """The body under its codings: HTTP's own chunks outside, ``aws-chunked`` inside."""
    length = headers.get("content-length") or "0"
    if not length.isdecimal():
        raise ConnectionAbortedError(f"{length!r} is no Content-Length")
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body: Any = io.BufferedReader(_Chunked(stream, trailers), _LINE)
    else:
        body = io.BufferedReader(_Limited(stream, int(length)), _LINE)
    if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        body = io.BufferedReader(_Chunked(body, trailers, inner=True), _LINE)
    return body


class _Limited(io.RawIOBase):
    """The next ``length`` bytes of a connection."""

    def __init__(self, stream: io.BufferedIOBase, length: int) -> None:
        self._stream, self._left = stream, length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(memoryview(buffer)[: self._left])
        if not count and self._left:
            raise ConnectionAbortedError("the body ends before its Content-Length")
        self._left -= count
        return count


class _Chunked(io.RawIOBase):
    """``size[;extension] CRLF data CRLF ... 0 CRLF trailers CRLF``: HTTP's chunks and S3's alike."""

    def __init__(self, stream: io.BufferedIOBase, trailers: dict[str, str], inner: bool = False) -> None:
        self._stream, self._trailers, self._inner = stream, trailers, inner
        self._left, self._ended = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and not self._ended:
            self._next()
        if self._ended:
            return 0
        count = self._stream.readinto(memoryview(buffer)[: self._left])
        if not count:
            raise ConnectionAbortedError("the body ends inside a chunk")
        self._left -= count
        if not self._left:
            self._stream.readline(_LINE)
        return count

    def _next(self) -> None:
        size = self._stream.readline(_LINE).partition(b";")[0].strip()
        try:
            self._left = int(size, 16)
        except ValueError:
            raise ConnectionAbortedError(f"{size[:20]!r} is no size of a chunk") from None
        if not self._left:
            self._ended = True
            self._trailers.update(_headers(self._stream))
            while self._inner and self._stream.read(_LINE):  # to the end of the coding around this one
                pass


def send(connection: socket.socket, answer: Answer, method: str, sent: Callable[[int], None], throttle: Pacing) -> None:
    """Send an answer; ``sent`` is told the bytes of each piece of the body. Raises ``ConnectionError``."""
    body = answer.body
    length = body.length if isinstance(body, Span) else len(body)
    headers = {"Content-Length": str(length), "Date": formatdate(usegmt=True), "Server": "FaultyS3", **answer.headers}
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")
    if method == "HEAD" or not length:
        connection.sendall(head)
    elif isinstance(body, bytes):
        connection.sendall(head + body)
        sent(length)
    else:
        connection.sendall(head, 0 if body.cut == 0 else _MORE)
        _send_span(connection, body, sent, throttle)


def _send_span(connection: socket.socket, span: Span, sent: Callable[[int], None], throttle: Pacing) -> None:
    stop = span.start + (span.length if span.cut is None else min(span.cut, span.length))
    flip = span.start + span.length // 2 if span.flip else -1
    piece = min(throttle.piece, 1 << 20) if span.flip else throttle.piece
    for start in range(span.start, stop, piece):
        count = min(piece, stop - start)
        throttle.wait(count)
        if start <= flip < start + count:
            data = bytearray(os.pread(span.file.fileno(), count, start))
            data[flip - start] ^= 1
            connection.sendall(data)
        else:
            _send_file(connection, span.file.fileno(), start, count)
        sent(count)
    if span.cut is not None:
        with suppress(OSError):  # the client was faster
            connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("cut on purpose")


def _send_file(connection: socket.socket, file: int, start: int, count: int) -> None:
    while count:
        done = os.sendfile(connection.fileno(), file, start, count)
        if not done:
            raise ConnectionAbortedError("the file has become shorter")
        start, count = start + done, count - done
