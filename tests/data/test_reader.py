"""Writer, index and reader: what goes in comes out, by either way of reading, and damage is told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dltrain import storage
from dltrain.data.index import ShardIndex, scan
from dltrain.data.manifest import load_manifest
from dltrain.data.reader import ShardDataset, ShardReader, open_reader
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


def read_all(url: str, memory: int) -> dict[str, dict[str, bytes]]:
    dataset = ShardDataset(open_reader(url, memory))
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    shards, indices = (np.array(column) for column in zip(*reversed(places), strict=True))
    samples = dataset.read(shards, indices)
    return {sample.key: {name: bytes(data) for name, data in sample.fields.items()} for sample in samples}


@pytest.mark.parametrize("memory", [256, 0], ids=["whole shards", "ranges"])
def test_samples_come_back_as_written(tmp_path: Path, memory: int) -> None:
    write(str(tmp_path))
    assert read_all(str(tmp_path), memory) == SAMPLES


@pytest.mark.parametrize("memory", [256, 0], ids=["whole shards", "ranges"])
def test_samples_come_back_from_s3(s3: S3Server, memory: int) -> None:
    url = f"s3://data/reader-{memory}"
    write(url)
    assert read_all(url, memory) == SAMPLES
    assert storage.listing(url)[0].startswith(f"{url}/")


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
    assert read_all(str(tmp_path), 0) == {f"folder/{key}": fields for key, fields in SAMPLES.items()}


def test_an_index_survives_its_bytes_and_refuses_others() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.txt", "a.json", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"xyz"))
    index = scan(buffer.getvalue())
    again = ShardIndex.from_bytes(index.to_bytes())
    assert (again.keys, again.extensions) == (("a", "b"), ("txt", "json"))
    assert [again.fields(place) for place in range(2)] == [index.fields(place) for place in range(2)]
    with pytest.raises(ValueError, match="format"):
        ShardIndex.from_bytes(b'{"format": "other"}\n')


@pytest.mark.parametrize("memory", [256, 0], ids=["whole shards", "ranges"])
def test_a_changed_byte_names_shard_and_key(tmp_path: Path, memory: int) -> None:
    write(str(tmp_path))
    reader = open_reader(str(tmp_path), memory)
    span = reader.index(1).fields(3)["bin"]
    file = tmp_path / "shard-000001.tar"
    data = bytearray(file.read_bytes())
    data[span.start + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"sample '018' of shard .*shard-000001\.tar is damaged .*bytes \d+-\d+"):
        read_all(str(tmp_path), memory)


@pytest.mark.parametrize("memory", [256, 0], ids=["whole shards", "ranges"])
def test_a_truncated_shard_is_told(tmp_path: Path, memory: int) -> None:
    write(str(tmp_path))
    file = tmp_path / "shard-000002.tar"
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"shard-000002\.tar is truncated"):
        read_all(str(tmp_path), memory)


def test_memory_is_bounded(tmp_path: Path) -> None:
    write(str(tmp_path), samples_per_shard=2)
    manifest = load_manifest(str(tmp_path))
    budget = 3 * max(shard.bytes for shard in manifest.shards)
    reader = ShardReader(manifest, budget)
    for shard in range(len(manifest.shards)):
        reader.read_part(shard, 0, 1)
        assert sum(len(data) for data in reader._whole.values()) <= budget


def test_a_key_cannot_be_written_twice(tmp_path: Path) -> None:
    writer = ShardWriter(str(tmp_path))
    writer.write("a", {"cls": b"1"})
    with pytest.raises(UserError, match="'a' is already written"):
        writer.write("a", {"cls": b"2"})
