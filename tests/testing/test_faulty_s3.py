"""The S3 server with faults, while it has none: to boto3 it is S3."""

from __future__ import annotations

import os
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

from dltrain.testing.faulty_s3 import FaultyS3
from tests.testing.asking import DATA, body, client_of, raw, refusal


def test_an_object_is_put_read_measured_and_deleted(s3: Any) -> None:
    etag = s3.put_object(Bucket="data", Key="x/y z+ü.bin", Body=b"hello", Metadata={"a": "b"})["ETag"]
    assert body(s3, "x/y z+ü.bin") == b"hello"
    head = s3.head_object(Bucket="data", Key="x/y z+ü.bin")
    assert (head["ContentLength"], head["ETag"], head["Metadata"]) == (5, etag, {"a": "b"})
    assert etag == '"5d41402abc4b2a76b9719d911017c592"'  # printf hello | md5sum
    s3.delete_object(Bucket="data", Key="x/y z+ü.bin")
    assert refusal(lambda: body(s3, "x/y z+ü.bin")) == (404, "NoSuchKey")


def test_what_is_not_there_is_refused_as_s3_does(s3: Any) -> None:
    assert refusal(lambda: body(s3, "nothing")) == (404, "NoSuchKey")
    assert refusal(lambda: s3.get_object(Bucket="nobody", Key="a")) == (404, "NoSuchBucket")
    assert refusal(lambda: s3.head_object(Bucket="data", Key="nothing")) == (404, "404")
    assert refusal(lambda: s3.list_objects_v2(Bucket="nobody")) == (404, "NoSuchBucket")
    assert refusal(lambda: s3.get_bucket_acl(Bucket="data")) == (501, "NotImplemented")
    copy = {"Bucket": "data", "Key": "a.bin"}
    assert refusal(lambda: s3.copy_object(Bucket="data", Key="b", CopySource=copy)) == (501, "NotImplemented")


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=299990-", 299_990, 300_000),
        ("bytes=-7", 299_993, 300_000),
        ("bytes=299999-400000", 299_999, 300_000),
        ("bytes=-400000", 0, 300_000),
    ],
)
def test_a_range_is_answered_with_its_place_in_the_whole(s3: Any, asked: str, start: int, stop: int) -> None:
    answer = s3.get_object(Bucket="data", Key="a.bin", Range=asked)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["ContentRange"] == f"bytes {start}-{stop - 1}/300000"
    assert answer["Body"].read() == DATA[start:stop]


def test_a_range_behind_the_end_is_refused(s3: Any) -> None:
    assert refusal(lambda: body(s3, Range="bytes=300000-")) == (416, "InvalidRange")


def test_if_match_holds_for_the_same_object_alone(s3: Any) -> None:
    etag = s3.head_object(Bucket="data", Key="a.bin")["ETag"]
    assert body(s3, IfMatch=etag) == DATA
    s3.put_object(Bucket="data", Key="a.bin", Body=b"other")
    assert refusal(lambda: body(s3, IfMatch=etag)) == (412, "PreconditionFailed")


def test_if_none_match_puts_new_objects_alone(s3: Any) -> None:
    s3.put_object(Bucket="data", Key="new", Body=b"1", IfNoneMatch="*")
    again = lambda: s3.put_object(Bucket="data", Key="new", Body=b"2", IfNoneMatch="*")  # noqa: E731
    assert refusal(again) == (412, "PreconditionFailed")
    assert body(s3, "new") == b"1"


def test_a_listing_gives_every_key_once_in_order_over_pages(s3: Any) -> None:
    keys = ["a.bin", "m/", "m/1", "m/2 ü+&<", "m/n/./4", "n//3", "o"]
    for key in keys[1:]:
        s3.put_object(Bucket="data", Key=key, Body=key.encode())
    for size in (1, 2, 3, 100):
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="data", PaginationConfig={"PageSize": size})
        found = [(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", ())]
        assert found == [(key, 300_000 if key == "a.bin" else len(key.encode())) for key in sorted(keys)]


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    ("words", "keys", "prefixes"),
    [
        ({}, ["a", "c-1"], ["b/", "c/"]),
        ({"Prefix": "b/"}, ["b/1"], ["b/2/"]),
        ({"Prefix": "c"}, ["c-1"], ["c/"]),
        ({"Prefix": "d"}, [], []),
        ({"StartAfter": "b/1"}, ["c-1"], ["b/", "c/"]),
    ],
)
def test_a_delimiter_rolls_keys_up(
    s3: Any, size: int, words: dict[str, str], keys: list[str], prefixes: list[str]
) -> None:
    for key in ("a", "b/1", "b/2/3", "b/2/4", "c-1", "c/1"):
        s3.put_object(Bucket="other", Key=key, Body=b"")
    words = {"Bucket": "other", "Delimiter": "/", **words}
    pages = list(s3.get_paginator("list_objects_v2").paginate(**words, PaginationConfig={"PageSize": size}))
    assert [item["Key"] for page in pages for item in page.get("Contents", ())] == keys
    assert [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())] == prefixes


def test_a_large_file_is_uploaded_in_parts(server: FaultyS3, s3: Any, tmp_path: Path) -> None:
    data = os.urandom(12_345_678)
    (tmp_path / "large").write_bytes(data)
    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    s3.upload_file(str(tmp_path / "large"), "data", "deep/large", Config=parts)
    answer = s3.get_object(Bucket="data", Key="deep/large")
    assert answer["Body"].read() == data
    assert answer["ETag"].endswith('-3"')  # 12.3 MB in parts of 5 MiB
    assert server.uploads() == []


def test_an_upload_is_not_seen_before_it_is_complete(server: FaultyS3, s3: Any) -> None:
    name = {"Bucket": "data", "Key": "large"}
    upload = s3.create_multipart_upload(**name)["UploadId"]
    part = s3.upload_part(**name, UploadId=upload, PartNumber=1, Body=b"first")
    assert server.uploads() == [("data", "large")]
    assert refusal(lambda: body(s3, "large")) == (404, "NoSuchKey")
    wrong = {"Parts": [{"PartNumber": 1, "ETag": '"0"'}]}
    complete = lambda parts: s3.complete_multipart_upload(**name, UploadId=upload, MultipartUpload=parts)  # noqa: E731
    assert refusal(lambda: complete(wrong)) == (400, "InvalidPart")
    complete({"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    assert body(s3, "large") == b"first"
    assert server.uploads() == []


def test_an_aborted_upload_leaves_nothing(server: FaultyS3, s3: Any) -> None:
    name = {"Bucket": "data", "Key": "large"}
    upload = s3.create_multipart_upload(**name)["UploadId"]
    s3.upload_part(**name, UploadId=upload, PartNumber=1, Body=b"first")
    s3.abort_multipart_upload(**name, UploadId=upload)
    assert server.uploads() == []
    late = lambda: s3.upload_part(**name, UploadId=upload, PartNumber=2, Body=b"second")  # noqa: E731
    assert refusal(late) == (404, "NoSuchUpload")


STREAMING = {"x-amz-content-sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER", "content-encoding": "aws-chunked"}


def chunked(data: bytes, size: int, crc: int) -> bytes:
    """A body as boto3 sends it over TLS: chunks, then its CRC-32 in a trailer."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    trailer = b"0\r\nx-amz-checksum-crc32:" + b64encode(crc.to_bytes(4, "big")) + b"\r\n\r\n"
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + trailer


def test_a_chunked_body_is_stored_without_its_chunks(server: FaultyS3, s3: Any) -> None:
    data = os.urandom(200_000)
    assert raw(server, "PUT", "/data/c", chunked(data, 65_536, zlib.crc32(data)), STREAMING)[0] == 200
    assert body(s3, "c") == data


def test_a_chunked_body_inside_http_s_own_chunks_is_stored_too(server: FaultyS3, s3: Any) -> None:
    data = os.urandom(200_000)
    whole = chunked(data, 65_536, zlib.crc32(data))
    pieces = iter([whole[:11], whole[11:150_000], whole[150_000:]])  # http.client chunks what it has no length of
    assert raw(server, "PUT", "/data/c", pieces, STREAMING)[0] == 200
    assert body(s3, "c") == data


def test_a_signed_chunked_body_is_stored_without_its_signatures(server: FaultyS3, s3: Any) -> None:
    sent = b"5;chunk-signature=ab\r\nhello\r\n0;chunk-signature=cd\r\n\r\n"
    signed = {"x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"}
    assert raw(server, "PUT", "/data/c", sent, signed)[0] == 200
    assert body(s3, "c") == b"hello"


def test_a_body_that_does_not_match_its_sum_is_refused(server: FaultyS3, s3: Any) -> None:
    status, text = raw(server, "PUT", "/data/c", chunked(b"hello", 5, 12345), STREAMING)
    assert status == 400
    assert b"BadDigest" in text
    assert refusal(lambda: s3.put_object(Bucket="data", Key="c", Body=b"hello", ContentMD5="AAAA")) == (
        400,
        "BadDigest",
    )
    assert refusal(lambda: body(s3, "c")) == (404, "NoSuchKey")


def test_the_bucket_may_stand_in_the_host_s_name(server: FaultyS3) -> None:
    assert raw(server, "GET", "/a.bin", headers={"Host": "data.localhost:9000"}) == (200, DATA)


def test_no_key_or_bucket_reaches_out_of_the_folder(server: FaultyS3) -> None:
    (server.folder / "secret").write_bytes(b"secret")
    for path in ("/data/../secret", "/data/%2E%2E/secret", "/..%2Fdata/secret", "/%2E%2E/secret", "/data/a%00b"):
        assert raw(server, "GET", path)[0] in (400, 404)
    (server.folder / "secret").unlink()


def test_files_of_a_folder_are_served_as_they_lie(tmp_path: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "x").write_bytes(b"first")
    with FaultyS3(buckets=(), folder=tmp_path) as server:
        s3 = client_of(server)
        first = s3.get_object(Bucket="mine", Key="deep/x")
        assert first["Body"].read() == b"first"
        (tmp_path / "mine" / "deep" / "x").write_bytes(b"second")
        second = s3.get_object(Bucket="mine", Key="deep/x")
        assert second["Body"].read() == b"second"
        assert first["ETag"] != second["ETag"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_deleted_objects_leave_no_folder_in_the_way(s3: Any) -> None:
    s3.put_object(Bucket="data", Key="x/y/z", Body=b"1")
    s3.delete_object(Bucket="data", Key="x/y/z")
    s3.delete_object(Bucket="data", Key="x/y/z")
    s3.put_object(Bucket="data", Key="x", Body=b"2")
    assert body(s3, "x") == b"2"
