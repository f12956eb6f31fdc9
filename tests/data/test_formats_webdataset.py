"""The library webdataset and we read what the other writes, and our shards feed its pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from dltrain import storage
from dltrain.data.building.indexing import index_shards
from dltrain.data.dataset import open_dataset
from dltrain.data.formats.webdataset import ShardList, as_webdataset, register_stores, shard_samples
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

SAMPLES = {f"class/{n:03d}": {"bin": bytes([n]) * n, "cls": b"%d" % (n % 3)} for n in range(25)}


def write(url: str) -> None:
    with ShardWriter(url, samples_per_shard=10) as writer:
        for key, fields in SAMPLES.items():
            writer.write(key, fields)


def plain(found: Any) -> dict[str, dict[str, bytes]]:
    return {
        sample["__key__"]: {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in found
    }


def read_all(url: str) -> dict[str, dict[str, bytes]]:
    dataset = open_dataset(url)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    samples = dataset.read(*(np.array(column) for column in zip(*places, strict=True)))
    return {sample.key: sample.fields for sample in samples}


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_what_its_shard_writer_writes(tmp_path: Path, compress: bool) -> None:
    pattern = str(tmp_path / ("x-%03d.tar" + (".gz" if compress else "")))
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0, compress=compress) as sink:
        for key, fields in SAMPLES.items():
            sink.write({"__key__": key, **fields})
    if compress:
        with pytest.raises(UserError, match=r"x-000\.tar\.gz is compressed \(gzip\).*dltrain shards convert"):
            index_shards(str(tmp_path))
    else:
        assert index_shards(str(tmp_path)).samples == 25
        assert read_all(str(tmp_path)) == SAMPLES


def test_its_pipeline_is_fed_by_our_shards(tmp_path: Path) -> None:
    write(str(tmp_path))
    pipeline = webdataset.DataPipeline(
        ShardList(str(tmp_path)), webdataset.split_by_worker, shard_samples, webdataset.decode()
    )
    found = plain(pipeline)
    assert len(found) == 25
    assert found["class/004"] == {"bin": bytes([4]) * 4, "cls": 1}


def test_its_pipeline_is_fed_by_samples_we_read(tmp_path: Path) -> None:
    write(str(tmp_path))
    samples = open_dataset(str(tmp_path)).read(np.array([2, 0]), np.array([4, 3]))
    found = list(webdataset.DataPipeline(lambda: as_webdataset(samples), webdataset.to_tuple("__key__", "cls")))
    assert found == [("class/024", b"0"), ("class/003", b"0")]


def test_a_damaged_member_does_not_come_through(tmp_path: Path) -> None:
    write(str(tmp_path))
    file = tmp_path / "shard-000001.tar"
    data = bytearray(file.read_bytes())
    data[512 + 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"field 'bin' of sample 'class/010' in .*shard-000001\.tar is not as its index"
    ):
        list(shard_samples(ShardList(str(tmp_path))))
    assert len(list(shard_samples([{"url": str(file)}]))) == 10  # without an index nothing tells


def test_it_opens_our_stores(s3: S3Server) -> None:
    register_stores()
    with webdataset.TarWriter("s3://data/theirs/x.tar") as sink:
        for key, fields in SAMPLES.items():
            sink.write({"__key__": key, **fields})
    assert storage.exists("s3://data/theirs/x.tar")
    assert plain(webdataset.WebDataset("s3://data/theirs/x.tar", shardshuffle=False)) == SAMPLES
    assert index_shards("s3://data/theirs").samples == 25
    assert read_all("s3://data/theirs") == SAMPLES
