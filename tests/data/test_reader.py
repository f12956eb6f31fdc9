"""Writer, index and reader: what goes in comes out, by either way of reading, and damage is told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dltrain import storage
from dltrain.data.dataset import Cache, open_dataset, open_reader
from dltrain.data.formats.tar import scan
from dltrain.data.index import ShardIndex
from dltrain.data.manifest import load_manifest
from dltrain.data.order import Order
from dltrain.data.stream import stream
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

SAMPLES = {
    f"{number:03d}": {"bin": bytes([number]) * (50 * number + 1), "cls": str(number).encode()} for number in range(40)
}


def write(url: str, samples_per_shard: int = 15) -> None:
    with ShardWriter(url, samples_per_shard=samples_per_shard, facts={"classes": 40}) as writer:
        for key, fields in SAMPLES.items():
            writer.write(key, fields)


def read_all(url: str, cache: Cache | None = None) -> dict[str, dict[str, bytes]]:
    dataset = open_dataset(url, cache=cache)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    shards, indices = (np.array(column) for column in zip(*reversed(places), strict=True))
    return {sample.key: sample.fields for sample in dataset.read(shards, indices)}


def test_samples_come_back_as_written(tmp_path: Path) -> None:
    write(str(tmp_path))
    assert read_all(str(tmp_path)) == SAMPLES


@pytest.mark.parametrize("cache", ["", "off"], ids=["cached", "ranges"])
def test_samples_come_back_from_s3(s3: S3Server, cache: str, tmp_path: Path) -> None:
    url = f"s3://data/reader{tmp_path}"
    write(url)
    assert read_all(url, Cache(cache or str(tmp_path))) == SAMPLES
    assert storage.listing(url)[0].startswith(f"{url}/")


def test_samples_come_back_from_memory() -> None:
    write("memory://reader")
    assert read_all("memory://reader") == SAMPLES


@pytest.mark.parametrize("cache", ["", "off"], ids=["cached", "ranges"])
def test_samples_one_after_another(s3: S3Server, cache: str, tmp_path: Path) -> None:
    url = f"s3://data/stream{tmp_path}"
    write(url)
    dataset = open_dataset(url, cache=Cache(cache or str(tmp_path)))
    order = Order(dataset.shard_sizes, seed=1, window=8)
    whole = [sample.key for sample in stream(dataset, order, stop=80, read=7)]
    assert sorted(whole[:40]) == sorted(whole[40:]) == list(SAMPLES)
    ranks = [list(stream(dataset, order, start=5, stop=80, rank=rank, ranks=3, read=4)) for rank in range(3)]
    assert [len(list(stream(dataset, order, stop=10, rank=rank, ranks=3, read=3))) for rank in range(3)] == [4, 3, 3]
    for rank, samples in enumerate(ranks):
        assert [sample.key for sample in samples] == [whole[p] for p in range(5, 80) if p % 3 == rank]
    assert next(iter(stream(dataset, order, start=400_003))).fields.keys() == {"bin", "cls"}


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("hello", "is not JSON"),
        ("[1, 2]", "is JSON, but not a list of shards"),
        ('{"shards": {"raw_data": {}}}', "is JSON, but not a list of shards"),
        ('{"version": 2, "facts": {}, "shards": []}', "has version 2"),
        ('{"version": 1, "facts": {}, "shards": [{"name": "a"}]}', "a line of .* does not describe a shard"),
        ('{"version": 1, "facts": null, "shards": []}', "is JSON, but not a list of shards"),
        ('{"version": 2, "lines": []}', "has version 2"),
        ('{"version": 1, "facts": {}, "shards": 7}', "a line of .* does not describe a shard"),
    ],
)
def test_a_manifest_of_another_shape_is_told(tmp_path: Path, text: str, refusal: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=refusal):
        load_manifest(str(tmp_path))


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write(str(tmp_path / "one"))
    write(str(tmp_path / "two"))
    assert load_manifest(str(tmp_path / "one")).fingerprint == load_manifest(str(tmp_path / "two")).fingerprint


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    write(str(tmp_path), samples_per_shard=100)
    found = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    }
    assert {key: {"bin": s["bin"], "cls": s["cls"]} for key, s in found.items()} == SAMPLES


def test_tars_of_webdataset_can_be_indexed(cli, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as sink:
        for key, fields in SAMPLES.items():
            sink.write({"__key__": f"folder/{key}", **fields})
    done = cli("shards", "index", str(tmp_path))
    assert done.status == 0, done.err
    assert read_all(str(tmp_path)) == {f"folder/{key}": fields for key, fields in SAMPLES.items()}


def test_an_index_survives_its_bytes_and_refuses_others() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.txt", "a.json", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"xyz"))
    buffer.seek(0)
    index = scan(buffer, "the tar").index
    again = ShardIndex.from_bytes(index.to_bytes())
    assert [again.key(sample) for sample in range(2)] == ["a", "b"]
    assert [again.members(sample) for sample in range(2)] == [index.members(sample) for sample in range(2)]
    assert [name for name, *_ in again.members(0)] == ["txt", "json"]
    with pytest.raises(ValueError, match="format"):
        ShardIndex.from_bytes(b'{"format": "other"}\n')
    with pytest.raises(ValueError, match="bytes instead of"):
        ShardIndex.from_bytes(index.to_bytes()[:-1])


def test_a_changed_byte_names_shard_and_key(tmp_path: Path) -> None:
    write(str(tmp_path))
    (_, start, _, _), _ = open_reader(str(tmp_path)).index(1).members(3)
    file = tmp_path / "shard-000001.tar"
    data = bytearray(file.read_bytes())
    data[start + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"sample '018' of shard .*shard-000001\.tar is damaged .*'bin', bytes \d+-\d+"):
        read_all(str(tmp_path))


def test_a_truncated_shard_is_told(tmp_path: Path) -> None:
    write(str(tmp_path))
    file = tmp_path / "shard-000002.tar"
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"shard-000002\.tar is truncated: field .* of sample '03\d'"):
        read_all(str(tmp_path))


def test_a_key_cannot_be_written_twice(tmp_path: Path) -> None:
    writer = ShardWriter(str(tmp_path))
    writer.write("a", {"cls": b"1"})
    with pytest.raises(UserError, match="'a' is already written"):
        writer.write("a", {"cls": b"2"})
