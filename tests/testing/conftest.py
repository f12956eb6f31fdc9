"""The S3 server with faults: one process for each module, a clean bucket for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dltrain.testing.faulty_s3 import Faults, FaultyS3
from tests.testing.asking import DATA, client_of


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyS3]:
    with FaultyS3(buckets=("data", "other")) as server:
        yield server


@pytest.fixture
def server(running: FaultyS3) -> FaultyS3:
    """Without faults, and holding ``data/a.bin`` alone."""
    running.set(Faults())
    for path in sorted((running.folder / "data").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (running.folder / "data" / "a.bin").write_bytes(DATA)
    running.forget()
    return running


@pytest.fixture(scope="module")
def client(running: FaultyS3) -> Any:
    return client_of(running)


@pytest.fixture
def s3(server: FaultyS3, client: Any) -> Any:
    return client
