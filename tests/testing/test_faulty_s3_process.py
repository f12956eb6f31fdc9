"""The S3 server with faults as a process: what it records, where it points, when it ends, its shell."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dltrain import storage
from dltrain.errors import UserError
from dltrain.testing.faulty_s3 import Faults, FaultyS3
from tests.testing.asking import SESSION, body, refusal, seconds

COMMAND = [sys.executable, "-m", "dltrain.testing.faulty_s3"]


def test_requests_are_recorded_and_counted(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(latency=0.1))
    body(s3, Range="bytes=0-9")
    s3.head_object(Bucket="data", Key="a.bin")
    s3.list_objects_v2(Bucket="data")
    refusal(lambda: body(s3, "nothing"))
    first, *_, last = server.requests()
    assert (first.method, first.bucket, first.key, first.range) == ("GET", "data", "a.bin", "bytes=0-9")
    assert (first.status, first.bytes_sent, first.access_key) == (206, 10, "local")
    assert 0.1 <= first.seconds < 0.5
    assert (last.key, last.status) == ("nothing", 404)
    assert server.counts() == {"GET": 2, "HEAD": 1, "LIST": 1}
    server.forget()
    assert server.requests() == []


def test_the_environment_points_at_the_server_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://before")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with FaultyS3() as server:
        assert server.variables.items() <= os.environ.items()
        storage.write("s3://data/x", b"hello")
        assert (server.folder / "data" / "x").read_bytes() == b"hello"
    assert os.environ["AWS_ENDPOINT_URL"] == "http://before"
    assert "AWS_ACCESS_KEY_ID" not in os.environ


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        FaultyS3(folder=tmp_path / "nowhere")


def is_closed(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def comes_true(claim: Callable[[], bool], within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while not claim() and time.monotonic() < end:
        time.sleep(0.05)
    return claim()


def test_the_server_dies_with_a_process_that_is_killed() -> None:
    program = (
        "import os, signal; from dltrain.testing.faulty_s3 import FaultyS3; server = FaultyS3(); server.__enter__();"
        "print(server.url, server.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    url, folder = done.stdout.split()
    assert comes_true(lambda: is_closed(url))
    assert comes_true(lambda: not Path(folder).exists())


def test_the_shell_s_server_prints_its_url_and_serves_with_faults(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_bytes(bytes(1_000_000))
    words = [*COMMAND, "--folder", str(tmp_path), "--latency", "0.1", "--bandwidth", "5e6", "--access-keys", "a,b"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        s3 = SESSION.client("s3", endpoint_url=url, aws_access_key_id="b", aws_secret_access_key="x")
        assert 0.29 < seconds(lambda: body(s3, "x")) < 0.8  # a tenth of a second, and 1 MB at 5 MB/s
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        process.stdout.close()


def test_the_shell_s_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    for words, sentence in (
        (["--folder", str(tmp_path / "nowhere")], "there is no folder"),
        (["--latency=-1"], "latency is -1.0; it must be a number from 0 up"),
        (["--bucket", "a/b"], "'a/b' is no name of a bucket"),
        (["--port", "99999"], "cannot listen on port 99999"),
    ):
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"faulty_s3: error: {sentence}")
        assert len(done.stderr.splitlines()) == 1
