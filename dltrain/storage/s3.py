"""Objects of S3 and of servers that speak its protocol.

botocore signs, finds credentials and regions, and retries; the endpoint comes from its own settings
(``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, profiles). Reads of more than one part go out as parallel ranged GETs
into one preallocated buffer, since a single connection to S3 is capped at some 50 MB/s. A client belongs to the
process that made it, so a forked worker never shares its parent's connections.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import boto3
from botocore.config import Config as ClientConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from dltrain.errors import UserError
from dltrain.storage.base import ObjectNotFound

PART_BYTES = 8 << 20
"""Size of one ranged GET."""

PARALLEL_PARTS = 8
"""Ranged GETs in flight for one object."""

BODY_ATTEMPTS = 4
"""How often a body is asked for when its connection is cut."""

T = TypeVar("T")

_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "ExpiredToken", "InvalidToken"}
_FORBIDDEN = {"403", "AccessDenied", "Forbidden"}
_MISSING = {"404", "NoSuchKey", "NotFound"}


class S3Store:
    """Objects as ``bucket/key``."""

    def size(self, path: str) -> int:
        bucket, key = _split(path)
        answer = _call(path, lambda: _client().head_object(Bucket=bucket, Key=key))
        return int(answer["ContentLength"])

    def read(self, path: str, start: int, stop: int | None) -> bytes | bytearray:
        if stop is None and start == 0:
            return self._get(path, None)
        stop = self.size(path) if stop is None else stop
        if stop - start <= PART_BYTES:
            return self._get(path, (start, stop)) if stop > start else b""
        return self._read_parts(path, start, stop)

    def write(self, path: str, data: bytes) -> None:
        bucket, key = _split(path)
        _call(path, lambda: _client().put_object(Bucket=bucket, Key=key, Body=data))

    def listing(self, path: str) -> list[str]:
        bucket, prefix = _split(path)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        contents = _call(path, lambda: [item for page in pages for item in page.get("Contents", ())])
        return sorted(f"{bucket}/{item['Key']}" for item in contents)

    def _get(self, path: str, span: tuple[int, int] | None) -> bytes:
        bucket, key = _split(path)
        extra = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}

        def get() -> bytes:
            return _client().get_object(Bucket=bucket, Key=key, **extra)["Body"].read()

        try:
            return _call(path, lambda: _again_if_cut(get))
        except _PastTheEnd:
            return b""

    def _read_parts(self, path: str, start: int, stop: int) -> bytearray:
        buffer = bytearray(stop - start)
        view = memoryview(buffer)

        def fill(first: int) -> int:
            data = self._get(path, (first, min(first + PART_BYTES, stop)))
            view[first - start : first - start + len(data)] = data
            return len(data)

        got = sum(_pool(os.getpid()).map(fill, range(start, stop, PART_BYTES)))
        view.release()
        return buffer if got == len(buffer) else buffer[:got]


class _PastTheEnd(Exception):
    """The range begins at or behind the object's last byte."""


def _again_if_cut(get: Callable[[], bytes]) -> bytes:
    """botocore tries requests again, not bodies: a connection cut while one streams is for us to mend."""
    for attempt in range(BODY_ATTEMPTS - 1):
        try:
            return get()
        except (ResponseStreamingError, IncompleteReadError, ReadTimeoutError):
            time.sleep(random.uniform(0, 0.2 * 2**attempt))
    return get()


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    if not bucket:
        raise UserError(f"s3://{path} names no bucket; write s3://BUCKET/KEY")
    return bucket, key


def _client() -> Any:
    return _client_of(os.getpid())


@lru_cache(maxsize=1)
def _client_of(process: int) -> Any:
    settings = ClientConfig(
        retries={"mode": "standard", "total_max_attempts": 4},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=2 * PARALLEL_PARTS,
    )
    return boto3.session.Session().client("s3", config=settings)


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="dltrain-s3")


def _call(path: str, request: Callable[[], T]) -> T:
    """Run a request; botocore's errors become one sentence."""
    try:
        return request()
    except ClientError as error:
        raise _refusal(path, error) from None
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            f"no complete AWS credentials for s3://{path} ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or a role"
        ) from None
    except (EndpointConnectionError, ConnectionError, HTTPClientError) as error:
        raise UserError(
            f"cannot reach the S3 endpoint {_client().meta.endpoint_url} for s3://{path} ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL, AWS_REGION and the network"
        ) from None
    except BotoCoreError as error:
        raise UserError(f"cannot ask S3 for s3://{path}: {error}") from None


def _refusal(path: str, error: ClientError) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    bucket, _ = _split(path)
    if code == "NoSuchBucket":
        return UserError(f"there is no bucket {bucket!r} (s3://{path}) at {_client().meta.endpoint_url}")
    if code in _MISSING:
        return ObjectNotFound(f"there is no object s3://{path}")
    if code in _CREDENTIALS:
        return UserError(f"S3 refused the credentials for s3://{path} ({code}); check AWS_ACCESS_KEY_ID or AWS_PROFILE")
    if code in _FORBIDDEN:
        return UserError(f"S3 denies access to s3://{path} ({code}); the role needs s3:GetObject and s3:ListBucket")
    if code in {"InvalidRange", "416"}:
        return _PastTheEnd()
    return UserError(f"S3 failed on s3://{path} ({code}): {error.response.get('Error', {}).get('Message', error)}")
