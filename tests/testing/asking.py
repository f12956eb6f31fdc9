"""Asking the S3 server with faults, as boto3 and as bare HTTP."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from dltrain.testing.faulty_s3 import FaultyS3

DATA = os.urandom(300_000)
"""What ``data/a.bin`` holds."""
SESSION = boto3.session.Session()


def client_of(server: FaultyS3, key: str = "local", **settings: Any) -> Any:
    """A client that tries once."""
    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=32, **settings)
    who = {"aws_access_key_id": key, "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return SESSION.client("s3", endpoint_url=server.url, config=config, **who)


def body(s3: Any, key: str = "a.bin", **words: Any) -> bytes:
    return bytes(s3.get_object(Bucket="data", Key=key, **words)["Body"].read())


def refusal(call: Callable[[], Any]) -> tuple[int, str]:
    """Status and code of the refusal that the call meets."""
    with pytest.raises(ClientError) as caught:
        call()
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def raw(server: FaultyS3, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
