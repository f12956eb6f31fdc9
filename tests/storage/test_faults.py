"""Reading through faults: what comes out is the object, or one sentence."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dltrain import storage
from dltrain.config import Storage
from dltrain.errors import UserError
from dltrain.storage import counters, s3_client
from dltrain.storage.base import ObjectChanged
from dltrain.storage.gate import Gate
from dltrain.testing.faulty_s3 import Faults, FaultyS3

MIB = 1 << 20
DATA = random.Random(0).randbytes(6 * MIB + 12_345)
URL = "s3://data/large"


pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with FaultyS3(buckets=("data",)) as server:
        storage.write(URL, DATA)
        yield server


def read() -> tuple[bytes, counters.Counts]:
    before = counters.snapshot()
    data = bytes(storage.read(URL, 0, len(DATA)))
    return data, counters.snapshot() - before


def test_three_times_slow_down_in_a_row(server: FaultyS3) -> None:
    server.set(Faults(slow_down=3))
    data, counts = read()
    assert data == DATA
    assert counts.throttled == 3


def test_a_connection_cut_again_and_again_goes_on_from_its_last_byte(server: FaultyS3) -> None:
    server.set(Faults(cut_after=300_000))
    data, counts = read()
    assert data == DATA
    assert counts.retries == 6 * 3  # three cuts in each MiB; the last piece is shorter than a cut
    assert counts.bytes == len(DATA)  # nothing came twice


def test_a_body_that_ends_early_is_asked_for_again(server: FaultyS3) -> None:
    server.set(Faults(truncate=2))
    assert read()[0] == DATA


def test_requests_that_are_never_answered_are_sent_again(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=0.3).model_dump_json())
    server.set(Faults(timeout_share=0.2, seed=1))
    data, counts = read()
    assert data == DATA
    assert counts.retries >= 1


def test_a_tenth_of_requests_told_to_slow_down(server: FaultyS3) -> None:
    server.set(Faults(slow_down_share=0.1))
    for _ in range(5):
        assert read()[0] == DATA


def test_an_object_overwritten_during_the_read_is_an_error(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, in_flight=2).model_dump_json())  # not all 7 parts at once
    storage.write("s3://data/changing", DATA)
    server.set(Faults(change_etag_after=2, bandwidth=5e6, keys="changing"))
    with pytest.raises(
        ObjectChanged, match=r"s3://data/changing was overwritten while it was being read.*new data set"
    ):
        storage.read("s3://data/changing", 0, len(DATA))


def test_an_object_overwritten_since_it_was_looked_at_is_an_error(server: FaultyS3) -> None:
    storage.write("s3://data/looked-at", b"one")
    etag = storage.stat("s3://data/looked-at").etag
    storage.write("s3://data/looked-at", b"two")
    with pytest.raises(ObjectChanged, match="was overwritten"):
        storage.read_into("s3://data/looked-at", 0, memoryview(bytearray(3)), etag)


def test_a_token_that_expires_is_replaced_by_what_the_chain_has_now(
    server: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    keys.write_text(text.format("old"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3_client.forget()
    assert read()[0] == DATA
    server.set(Faults(expire_after=0, expired=("old",)))
    keys.write_text(text.format("new"))
    assert read()[0] == DATA
    assert {record.access_key for record in server.requests() if record.status == 206} == {"old", "new"}


def test_expired_credentials_without_newer_ones_are_told(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(attempts=2).model_dump_json())
    server.set(Faults(expire_after=0))
    with pytest.raises(UserError, match=r"for s3://data/large \(2 attempts, the last: ExpiredToken\)"):
        storage.read(URL)


def test_a_server_that_never_recovers_is_given_up(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(attempts=3).model_dump_json())
    server.set(Faults(slow_down_share=1.0))
    with pytest.raises(UserError, match=r"3 attempts, the last: SlowDown"):
        storage.read(URL)


def test_a_read_that_nobody_waits_for_ends_soon(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit of a process waits for its threads: they must not go on for as many attempts as are allowed."""
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=1.0, attempts=1000).model_dump_json())
    assert read()[0] == DATA
    server.set(Faults(slow_down_share=1.0))
    unwanted = threading.Event()
    threading.Timer(0.3, unwanted.set).start()
    began = time.monotonic()
    with pytest.raises(storage.Cancelled), storage.cancelled_by(unwanted):
        storage.read(URL, 0, len(DATA))
    assert 0.2 < time.monotonic() - began < 2.0
    server.set(Faults(latency=0.2))
    sent, unwanted = counters.snapshot().requests, threading.Event()
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, in_flight=1).model_dump_json())
    threading.Timer(0.3, unwanted.set).start()
    with pytest.raises(storage.Cancelled), storage.cancelled_by(unwanted):
        storage.read(URL, 0, len(DATA))
    assert counters.snapshot().requests - sent <= 2  # those that wait for their turn are not sent at all
    server.set(Faults())
    assert read()[0] == DATA


def test_a_server_that_serves_few_at_a_time_is_not_overrun(server: FaultyS3) -> None:
    server.set(Faults(throttle_above=4, latency=0.02))
    for _ in range(4):
        assert read()[0] == DATA
    answers = [record.status for record in server.requests() if record.method == "GET"]
    assert answers.count(206) == 4 * 7
    assert answers.count(503) < answers.count(206)


def test_the_gate_halves_at_once_and_recovers_slowly(tmp_path: Path) -> None:
    gate = Gate(16, 0, tmp_path)
    gate.slow_down(10.0)
    gate.slow_down(10.1)  # of the same second: the same complaint
    assert gate.limit == 8
    gate.slow_down(12.0)
    assert gate.limit == 4
    for _ in range(5):
        gate.succeeded()
    assert gate.limit == 5
    for _ in range(1000):
        gate.succeeded()
    assert gate.limit == 16


def test_processes_of_a_node_keep_to_one_number_of_requests(server: FaultyS3) -> None:
    settings = Storage(part_mib=1, node_in_flight=3).model_dump_json()
    server.set(Faults(throttle_above=3, latency=0.02))
    code = "from dltrain import storage; assert len(storage.read('s3://data/large', 0, 6 << 20)) == 6 << 20"
    environment = {**os.environ, "DLTRAIN_STORAGE": settings}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    assert {record.status for record in server.requests() if record.method == "GET"} == {206}


def test_forked_and_spawned_children_read_while_their_parent_does(server: FaultyS3) -> None:
    assert read()[0] == DATA
    child = os.fork()
    if child == 0:
        os._exit(0 if read()[0] == DATA else 1)
    assert read()[0] == DATA
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("faults", "settings", "refusal"),
    [
        (Faults(deny_unsigned=True), {"anonymous": True}, "S3 denies access"),
        (Faults(require_request_payer=True), {}, "requester_pays true"),
    ],
)
def test_access_that_is_not_given_is_told(
    server: FaultyS3, monkeypatch: pytest.MonkeyPatch, faults: Faults, settings: dict[str, bool], refusal: str
) -> None:
    server.set(faults)
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(**settings).model_dump_json())
    with pytest.raises(UserError, match=refusal):
        storage.read(URL, 0, 10)


def test_ways_of_access(server: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(anonymous=True).model_dump_json())
    assert storage.read(URL, 0, 10) == DATA[:10]
    assert server.requests()[-1].access_key == ""
    server.set(Faults(require_request_payer=True))
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(requester_pays=True).model_dump_json())
    assert storage.read(URL, 0, 10) == DATA[:10]
    server.set(Faults())
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(sse_customer_key=str(key)).model_dump_json())
    storage.write("s3://data/secret", b"for us alone")
    assert storage.read("s3://data/secret") == b"for us alone"
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(kms_key="alias/ours").model_dump_json())
    with pytest.raises(UserError, match="s3://data/secret"):
        storage.read("s3://data/secret")
    storage.write("s3://data/managed", b"x")
    head = s3_client.client().head_object(Bucket="data", Key="managed")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/ours")
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(endpoint_url=server.url, path_style=True).model_dump_json())
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert storage.read(URL, 0, 10) == DATA[:10]


def test_a_customer_key_of_another_length_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"short")
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(sse_customer_key=str(key)).model_dump_json())
    with pytest.raises(UserError, match=r"has 5 bytes; SSE-C takes a key of 32"):
        storage.read(URL, 0, 10)


def test_a_large_object_is_seen_whole_or_not_at_all(server: FaultyS3, tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(70 * MIB))
    server.set(Faults(bandwidth=20e6))
    code = "import sys, pathlib, dltrain.storage as s; s.upload(pathlib.Path(sys.argv[1]), sys.argv[2])"
    child = subprocess.Popen([sys.executable, "-c", code, str(file), "s3://data/upload"])
    while not any(record.method == "PUT" and record.key == "upload" for record in server.requests()):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not storage.exists("s3://data/upload")
    server.set(Faults())
    storage.upload(file, "s3://data/upload")
    assert storage.size("s3://data/upload") == 70 * MIB


def test_the_web_is_read_by_ranges_and_cannot_be_written(server: FaultyS3) -> None:
    url = f"{server.url}/data/large"
    assert storage.read(url, 0, len(DATA)) == DATA
    assert storage.read(url) == DATA
    assert storage.size(url) == len(DATA)
    server.set(Faults(cut_after=300_000, slow_down=2))
    assert storage.read(url, 0, len(DATA)) == DATA
    assert not storage.exists(f"{server.url}/data/nothing")
    with pytest.raises(UserError, match="cannot be written over http"):
        storage.write(url, b"")
    with pytest.raises(UserError, match="cannot be listed over http"):
        storage.listing(f"{server.url}/data")
    with pytest.raises(UserError, match=r"cannot read http://127\.0\.0\.1:9/x"):
        storage.read("http://127.0.0.1:9/x")


def test_an_object_can_be_read_as_a_file(server: FaultyS3) -> None:
    with storage.open_object(URL, ahead=2 * MIB) as file:
        assert file.read(10) == DATA[:10]
        file.seek(-100, os.SEEK_END)
        assert file.read() == DATA[-100:]
        file.seek(0)
        assert file.read() == DATA
