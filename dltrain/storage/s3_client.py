"""Clients of S3: whose credentials, which endpoint, how patient.

botocore signs each request with credentials from its own chain, which refreshes those of roles while a run goes on; a
client belongs to the process that made it, so a forked worker never shares its parent's connections. Retries are ours
(``ranges.py``): botocore's would not mend a body that is cut.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config as ClientConfig
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.exceptions import BotoCoreError

from dltrain.config.tree import Storage
from dltrain.errors import UserError
from dltrain.storage.settings import settings

_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: another thread may have held the lock at the fork."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def client(patient: bool = False) -> Any:
    """The client of this process; a ``patient`` one retries by itself, for requests without a body to mend."""
    with _lock:
        return _client(os.getpid(), settings(), patient)


def forget() -> None:
    """Look for credentials and endpoint anew at the next request."""
    with _lock:
        _client.cache_clear()


def read_extras() -> dict[str, Any]:
    """What every request for an object carries: who pays, and the customer's key."""
    mine = settings()
    payer = {"RequestPayer": "requester"} if mine.requester_pays else {}
    return {**payer, **_customer_key(mine.sse_customer_key)}


def write_extras() -> dict[str, Any]:
    """What every new object carries: the same, and the key of KMS."""
    key = settings().kms_key
    return {**read_extras(), **({"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {})}


@lru_cache(maxsize=4)
def _client(process: int, mine: Storage, patient: bool) -> Any:
    try:
        session = boto3.session.Session(profile_name=mine.profile or None)
        if mine.role:
            _assume(session, mine.role)
        return session.client("s3", endpoint_url=mine.endpoint_url or None, config=_settings(mine, patient))
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"cannot set up access to S3: {error}; check the storage section and AWS's settings") from None


def _settings(mine: Storage, patient: bool) -> ClientConfig:
    unsigned = {"signature_version": UNSIGNED} if mine.anonymous else {}
    addressing = {"s3": {"addressing_style": "path"}} if mine.path_style else {}
    return ClientConfig(
        retries={"mode": "standard", "total_max_attempts": mine.attempts if patient else 1},
        connect_timeout=min(5.0, mine.timeout),
        read_timeout=mine.timeout,
        max_pool_connections=mine.in_flight,
        response_checksum_validation="when_required",  # our own checksums cover every byte
        **unsigned,
        **addressing,
    )


def _assume(session: Any, role: str) -> None:
    """Act under a role, its credentials fetched when needed and again before they expire."""
    core = session._session
    fetcher = AssumeRoleCredentialFetcher(core.create_client, session.get_credentials(), role)
    core._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")


@lru_cache(maxsize=4)
def _customer_key(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        key = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read storage.sse_customer_key {path}: {error.strerror}") from None
    if len(key) != 32:
        raise UserError(f"storage.sse_customer_key {path} has {len(key)} bytes; SSE-C takes a key of 32 (AES-256)")
    return {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
