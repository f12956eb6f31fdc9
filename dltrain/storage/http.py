"""Objects of web servers that answer ranged requests, by ``http://`` and ``https://``; they can be read only."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError

from dltrain.errors import UserError
from dltrain.storage.base import Interrupted, ObjectChanged, ObjectInfo, ObjectNotFound, PastTheEnd
from dltrain.storage.body import HTTPBody, whole_size
from dltrain.storage.remote import RangedReads
from dltrain.storage.settings import settings

_REDIRECTS = urllib3.Retry(total=5, connect=0, read=0, status=0, other=0, redirect=5)
"""Other retries are those of ``ranges.py``."""


class HTTPStore(RangedReads):
    """``scheme`` is http or https; a path is host and name, with its query if there is one."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def stat(self, path: str) -> ObjectInfo:
        try:
            body = self._ask(path, "bytes=0-0", "")
        except PastTheEnd:
            return ObjectInfo(0)
        except Interrupted as error:
            raise self.unreachable(path, str(error)) from None
        body.close()
        return body.info

    def open(self, path: str, start: int, stop: int | None, etag: str) -> HTTPBody:
        return self._ask(path, f"bytes={start}-{'' if stop is None else stop - 1}", etag)

    def url(self, path: str) -> str:
        return f"{self._scheme}://{path}"

    def unreachable(self, path: str, reason: str) -> UserError:
        return UserError(f"cannot read {self.url(path)} ({reason}); check the URL and the network")

    def write(self, path: str, data: bytes) -> None:
        raise self._read_only(path)

    def upload(self, file: Path, path: str) -> None:
        raise self._read_only(path)

    def delete(self, path: str) -> None:
        raise self._read_only(path)

    def listing(self, path: str) -> list[str]:
        raise UserError(f"{self.url(path)} cannot be listed over {self._scheme}; name a data set with a manifest.json")

    def _read_only(self, path: str) -> UserError:
        return UserError(f"{self.url(path)} cannot be written over {self._scheme}; give an s3:// URL or a local folder")

    def _ask(self, path: str, span: str, etag: str) -> HTTPBody:
        headers = {"Range": span, "Accept-Encoding": "identity", **({"If-Match": etag} if etag else {})}
        try:
            answer = _connections(os.getpid()).request(
                "GET", self.url(path), headers=headers, preload_content=False, retries=_REDIRECTS
            )
        except HTTPError as error:
            raise Interrupted(type(error.reason if hasattr(error, "reason") else error).__name__) from None
        if answer.status == 206 or (answer.status == 200 and span.startswith("bytes=0-")):
            size = whole_size(answer.headers.get("Content-Range", ""), int(answer.headers.get("Content-Length", -1)))
            if size is None:
                answer.close()
                raise UserError(f"the server of {self.url(path)} does not tell its size; copy the data elsewhere")
            tag = answer.headers.get("ETag", "")
            return HTTPBody(answer, ObjectInfo(size, "" if tag.startswith("W/") else tag))
        answer.close()
        raise self._refusal(path, answer.status)

    def _refusal(self, path: str, status: int) -> Exception:
        if status in (404, 410):
            return ObjectNotFound(f"there is no object {self.url(path)}")
        if status == 416:
            return PastTheEnd()
        if status == 412:
            return ObjectChanged(f"{self.url(path)} was overwritten while it was being read; shards must not change")
        if status in (429, 503):
            return Interrupted(f"status {status}", throttled=True)
        if status >= 500:
            return Interrupted(f"status {status}")
        if status == 200:
            return UserError(f"the server of {self.url(path)} answers no ranged requests; copy the data elsewhere")
        return UserError(f"{self.url(path)} is refused with status {status}; check the URL and its permissions")


@lru_cache(maxsize=1)
def _connections(process: int) -> urllib3.PoolManager:
    mine = settings()
    timeout = urllib3.Timeout(connect=min(5.0, mine.timeout), read=mine.timeout)
    return urllib3.PoolManager(num_pools=16, maxsize=mine.in_flight, timeout=timeout)
