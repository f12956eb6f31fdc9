"""Storage: the same four verbs on every scheme, and failures told in a sentence that says what to change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dltrain import storage
from dltrain.errors import UserError
from dltrain.storage import counters
from dltrain.storage.base import ObjectNotFound
from dltrain.testing.s3 import S3Server


@pytest.fixture(params=["file", "memory", "s3", "path"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> str:
    return {
        "file": f"file://{tmp_path}/x",
        "path": f"{tmp_path}/x",
        "memory": f"memory://{tmp_path}",
        "s3": f"s3://data{tmp_path}",
    }[request.param]


def test_objects_are_written_read_listed_and_measured(folder: str) -> None:
    url = storage.join(folder, "a/b.bin")
    assert not storage.exists(url)
    storage.write(url, b"0123456789")
    storage.write(storage.join(folder, "c"), b"")
    assert bytes(storage.read(url)) == b"0123456789"
    assert bytes(storage.read(url, 3, 6)) == b"345"
    assert bytes(storage.read(url, 8, 20)) == b"89"
    assert bytes(storage.read(url, 20, 30)) == b""
    assert storage.size(url) == 10
    assert storage.listing(folder) == [url, storage.join(folder, "c")]
    with pytest.raises(ObjectNotFound, match="nothing"):
        storage.read(storage.join(folder, "nothing"))


def test_large_objects_are_read_in_parallel_parts(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", '{"part_mib": 1}')
    data = os.urandom(5_345_678)
    storage.write("s3://data/parts", data)
    before = counters.snapshot()
    assert bytes(storage.read("s3://data/parts", 0, len(data))) == data
    assert (counters.snapshot() - before).requests == 6
    assert bytes(storage.read("s3://data/parts")) == data
    assert bytes(storage.read("s3://data/parts", 11, 3_009_876)) == data[11:3_009_876]
    assert bytes(storage.read("s3://data/parts", 100, 9_999_999)) == data[100:]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(tmp_path / "kept")
    storage.write(target, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        storage.write(target, b"new")
    monkeypatch.undo()
    assert storage.read(target) == b"old"


def test_a_forked_child_reads_by_itself(s3: S3Server) -> None:
    storage.write("s3://data/fork", b"hello")
    assert storage.read("s3://data/fork") == b"hello"
    child = os.fork()
    if child == 0:
        os._exit(0 if bytes(storage.read("s3://data/fork")) == b"hello" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("variables", "url", "message"),
    [
        ({}, "s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
        ({}, "s3:///x", "names no bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://data/x", "cannot reach the S3 endpoint http://127.0.0.1:9"),
        ({"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}, "s3://data/x", "no complete AWS credentials"),
        ({}, "gs://data/x", "no store for gs:// URLs"),
    ],
)
def test_failures_are_one_sentence_within_seconds(
    s3: S3Server, variables: dict[str, str], url: str, message: str
) -> None:
    code = (
        "import sys; from dltrain import storage; from dltrain.errors import UserError\n"
        "try: storage.read(sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **variables}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, url], env=environment, capture_output=True, text=True, timeout=30
    )
    assert message in done.stdout, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert time.monotonic() - began < 15


def test_refused_credentials_are_told(s3: S3Server) -> None:
    """moto checks signatures only when told to; its server says so for one process, hence a server of its own."""
    code = (
        "from dltrain.testing.s3 import S3Server\nfrom dltrain import storage\nfrom dltrain.errors import UserError\n"
        "import os\nwith S3Server('data'):\n"
        "    import moto.core.responses, moto.settings\n"
        "    moto.core.responses.ActionAuthenticatorMixin.request_count = 10**6\n"
        "    moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0\n"
        "    try: storage.read('s3://data/x')\n"
        "    except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "S3 refused the credentials" in done.stdout, done.stderr + done.stdout


def test_a_listing_stays_within_its_folder(folder: str) -> None:
    for name in ("digits/a.tar", "digits-old/b.tar"):
        storage.write(storage.join(folder, name), b"x")
    assert storage.listing(storage.join(folder, "digits")) == [storage.join(folder, "digits/a.tar")]
