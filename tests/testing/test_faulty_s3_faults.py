"""Each fault of the S3 server does what it says, and nothing else."""

from __future__ import annotations

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from dltrain.errors import UserError
from dltrain.testing.faulty_s3 import Faults, FaultyS3
from tests.testing.asking import DATA, body, client_of, refusal, seconds


def test_latency_is_added_to_every_answer(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(latency=0.2))
    for call in (lambda: body(s3), lambda: s3.head_object(Bucket="data", Key="a.bin")):
        assert 0.2 <= seconds(call) < 0.6


def test_bandwidth_holds_each_body_to_its_rate(server: FaultyS3, s3: Any) -> None:
    (server.folder / "data" / "a.bin").write_bytes(bytes(10_000_000))
    server.set(Faults(bandwidth=20e6))
    assert 0.475 < seconds(lambda: body(s3)) < 0.75  # 10 MB at 20 MB/s: half a second
    assert 0.475 < seconds(lambda: s3.put_object(Bucket="data", Key="b", Body=bytes(10_000_000))) < 0.75


def test_bandwidth_is_per_connection(server: FaultyS3, s3: Any) -> None:
    (server.folder / "data" / "a.bin").write_bytes(bytes(5_000_000))
    server.set(Faults(bandwidth=10e6))
    with ThreadPoolExecutor(8) as pool:
        assert 0.475 < seconds(lambda: list(pool.map(lambda _: body(s3), range(8)))) < 0.75


def test_total_bandwidth_is_shared(server: FaultyS3, s3: Any) -> None:
    (server.folder / "data" / "a.bin").write_bytes(bytes(5_000_000))
    server.set(Faults(total_bandwidth=40e6))
    with ThreadPoolExecutor(8) as pool:  # 8 x 5 MB at 40 MB/s together: one second
        assert 0.94 < seconds(lambda: list(pool.map(lambda _: body(s3), range(8)))) < 1.5


def test_slow_down_strikes_the_next_gets_alone(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(slow_down=2))
    s3.head_object(Bucket="data", Key="a.bin")
    assert [refusal(lambda: body(s3)) for _ in range(2)] == [(503, "SlowDown")] * 2
    assert body(s3) == DATA


def statuses(server: FaultyS3, requests: int) -> list[int]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    found = []
    for _ in range(requests):
        connection.request("HEAD", "/data/a.bin")
        answer = connection.getresponse()
        answer.read()
        found.append(answer.status)
    connection.close()
    return found


def test_slow_down_share_strikes_its_share_the_same_for_a_seed(server: FaultyS3) -> None:
    faults = Faults(slow_down_share=0.3, seed=5)
    server.set(faults)
    first = statuses(server, 200)
    assert set(first) == {200, 503}
    assert abs(first.count(503) - 60) <= 20  # three standard deviations of a binomial: 3 * sqrt(200 * .3 * .7) = 19.4
    server.set(faults)
    assert statuses(server, 200) == first
    server.set(Faults(slow_down_share=0.3, seed=6))
    assert statuses(server, 200) != first


def test_throttle_above_refuses_gets_that_come_on_top(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(throttle_above=2, latency=0.5))
    together = threading.Barrier(6)

    def ask() -> bool:
        together.wait()
        try:
            return body(s3) == DATA
        except ClientError as error:
            return bool(error.response["Error"]["Code"] != "SlowDown")

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask) for _ in range(6)]
        assert sorted(answer.result() for answer in answers) == [False] * 4 + [True] * 2
    assert body(s3) == DATA


def test_cut_after_ends_each_body_early(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(cut_after=100_000))
    got = bytearray()
    for start in range(0, 300_000, 100_000):
        part = s3.get_object(Bucket="data", Key="a.bin", Range=f"bytes={start}-")["Body"]
        got += part.read(100_000)
        if start < 200_000:
            with pytest.raises((IncompleteReadError, ResponseStreamingError)):
                part.read()
    assert got == DATA
    assert [record.bytes_sent for record in server.requests()] == [100_000] * 3


def test_cut_after_no_byte_at_all(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(cut_after=0))
    with pytest.raises((IncompleteReadError, ResponseStreamingError, ConnectionClosedError)):
        body(s3)


def test_cut_next_cuts_so_many_gets(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(cut_after=1000, cut_next=1))
    assert len(body(s3, Range="bytes=0-9")) == 10  # too short to be cut
    with pytest.raises((IncompleteReadError, ResponseStreamingError)):
        body(s3)
    assert body(s3) == DATA


def test_truncate_halves_a_body_without_a_sign(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(truncate=1))
    assert body(s3) == DATA[:150_000]
    assert body(s3) == DATA


def test_flip_bit_changes_one_bit_of_matching_keys(server: FaultyS3, s3: Any) -> None:
    (server.folder / "data" / "b.txt").write_bytes(DATA)
    server.set(Faults(flip_bit="*.bin", flip_next=2))
    for _ in range(2):
        other = int.from_bytes(body(s3)) ^ int.from_bytes(DATA)
        assert other.bit_count() == 1
        assert body(s3, "b.txt") == DATA
    assert body(s3) == DATA


def test_flip_bit_without_a_number_goes_on(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(flip_bit="*"))
    assert [body(s3, Range="bytes=7-7") == DATA[7:8] for _ in range(5)] == [False] * 5


def test_a_request_that_times_out_is_never_answered(server: FaultyS3) -> None:
    server.set(Faults(timeout_share=1.0))
    with pytest.raises(ReadTimeoutError):
        body(client_of(server, read_timeout=0.3))
    server.set(Faults())
    assert [(record.key, record.status) for record in server.requests()] == [("a.bin", 0)]


def test_expired_credentials_are_refused_and_new_ones_are_not(server: FaultyS3) -> None:
    server.set(Faults(expire_after=2, expired=("old",)))
    old, new = client_of(server, "old"), client_of(server, "new")
    assert [body(old), body(old)] == [DATA, DATA]
    assert refusal(lambda: body(old)) == (400, "ExpiredToken")
    assert body(new) == DATA


def test_unknown_access_keys_are_refused(server: FaultyS3) -> None:
    server.set(Faults(access_keys=("known",)))
    assert refusal(lambda: body(client_of(server, "strange"))) == (403, "InvalidAccessKeyId")
    assert body(client_of(server, "known")) == DATA


def test_unsigned_requests_pass_unless_they_are_denied(server: FaultyS3) -> None:
    anonymous = client_of(server, signature_version=UNSIGNED)
    assert body(anonymous) == DATA
    server.set(Faults(deny_unsigned=True))
    assert refusal(lambda: body(anonymous)) == (403, "AccessDenied")
    assert [record.access_key for record in server.requests()] == ["", ""]


def test_a_bucket_whose_readers_pay_asks_for_the_header(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(require_request_payer=True))
    assert refusal(lambda: body(s3)) == (403, "AccessDenied")
    assert body(s3, RequestPayer="requester") == DATA


def test_an_object_is_replaced_after_some_gets(server: FaultyS3, s3: Any) -> None:
    server.set(Faults(change_etag_after=2))
    etag = s3.head_object(Bucket="data", Key="a.bin")["ETag"]
    assert [body(s3, IfMatch=etag), body(s3, IfMatch=etag)] == [DATA, DATA]
    assert refusal(lambda: body(s3, IfMatch=etag)) == (412, "PreconditionFailed")
    assert body(s3) == bytes(255 - byte for byte in DATA)
    assert s3.head_object(Bucket="data", Key="a.bin")["ETag"] != etag
    assert (server.folder / "data" / "a.bin").read_bytes() == DATA
    s3.put_object(Bucket="data", Key="a.bin", Body=b"newest")
    assert body(s3) == b"newest"


def test_faults_apply_to_the_keys_they_name(server: FaultyS3, s3: Any) -> None:
    (server.folder / "data" / "b.txt").write_bytes(b"b")
    server.set(Faults(keys="*.bin", slow_down=9, deny_unsigned=True))
    assert body(s3, "b.txt") == b"b"
    assert len(s3.list_objects_v2(Bucket="data")["Contents"]) == 2
    assert refusal(lambda: body(s3)) == (503, "SlowDown")


def test_an_object_under_a_customer_s_key_needs_the_key(s3: Any) -> None:
    mine = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": b"k" * 32}
    s3.put_object(Bucket="data", Key="sealed", Body=b"secret", **mine)
    assert refusal(lambda: body(s3, "sealed")) == (400, "InvalidRequest")
    assert refusal(lambda: body(s3, "sealed", **{**mine, "SSECustomerKey": b"x" * 32})) == (400, "InvalidRequest")
    assert body(s3, "sealed", **mine) == b"secret"


def test_the_key_of_kms_is_told_by_head(s3: Any, tmp_path: Path) -> None:
    kms = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/mine"}
    s3.put_object(Bucket="data", Key="one", Body=b"1", **kms)
    (tmp_path / "large").write_bytes(bytes(6 << 20))
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    s3.upload_file(str(tmp_path / "large"), "data", "two", ExtraArgs=kms, Config=parts)
    for key in ("one", "two"):
        head = s3.head_object(Bucket="data", Key=key)
        assert {name: head[name] for name in kms} == kms


def test_faults_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="slow_down_share is 2; a share lies between 0 and 1"):
        Faults(slow_down_share=2)
    with pytest.raises(UserError, match=r"latency is -1; it must be a number from 0 up"):
        Faults(latency=-1)
    with pytest.raises(UserError, match="keys is 5; it takes str"):
        Faults(keys=5)  # type: ignore[arg-type]
