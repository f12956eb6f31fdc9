"""What tests share: a cache of bundled data, an S3 server, and the command line as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dltrain.config import Storage
from dltrain.testing.faulty_s3 import Faults, FaultyS3
from dltrain.testing.s3 import S3Server, forget_client

ROOT = Path(__file__).parent.parent
TINY = str(Path(__file__).parent / "recipes" / "tiny.py")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line of standard output as JSON."""
        return dict(json.loads(self.out.splitlines()[-1]))


Cli = Callable[..., Done]


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["DLTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with S3Server("data") as server:
        yield server


@pytest.fixture
def no_faults(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module's S3 server without the faults, and this process without the clients, of the test before.

    Parts are small and waits short.
    """
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=1.0).model_dump_json())
    monkeypatch.setattr("dltrain.storage.ranges._FIRST_PAUSE", 0.01)
    server.set(Faults())
    server.forget()
    yield
    server.set(Faults())
    forget_client()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    # lazily: threads that were told to end may hold a file for a moment
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``dltrain ...`` in a folder of the test's own."""

    def run(*words: str, timeout: float = 120, **variables: str) -> Done:
        command = [sys.executable, "-m", "dltrain", *words]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=timeout)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when asked for; GPU tests where there is a GPU."""
    chosen = config.getoption("-m") or ""
    for item in items:
        if "slow" in item.keywords and "slow" not in chosen:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
