"""The writer: shards that everybody reads, the same bytes for the same samples, nothing half-written, little memory."""

from __future__ import annotations

import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset

from dltrain import storage
from dltrain.data.formats.tar import scan
from dltrain.data.index import ShardIndex
from dltrain.data.manifest import load_manifest
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

SAMPLES = {f"folder/{n:03d}": {"png": bytes([n]) * (40 * n), "left.cls": b"%d" % n} for n in range(30)}


def write(url: str, samples_per_shard: int | None = None, bytes_per_shard: int = 1 << 30) -> list[int]:
    with ShardWriter(url, samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard) as writer:
        for key, fields in SAMPLES.items():
            writer.write(key, fields)
    return [shard.samples for shard in load_manifest(url).shards]


def test_the_index_made_on_the_way_is_that_of_the_file(tmp_path: Path) -> None:
    write(str(tmp_path), samples_per_shard=11)
    for place, shard in enumerate(load_manifest(str(tmp_path)).shards):
        with (tmp_path / shard.name).open("rb") as file:
            found = scan(file, shard.name)
        assert found.index.to_bytes() == (tmp_path / shard.index).read_bytes(), place
        assert (found.bytes, found.crc32c) == (shard.bytes, shard.crc32c)


def test_tarfile_and_webdataset_read_what_is_written(tmp_path: Path) -> None:
    write(str(tmp_path))
    with tarfile.open(tmp_path / "shard-000000.tar") as archive:
        infos = archive.getmembers()
    assert {(info.mtime, info.uid, info.gid, info.mode, info.uname) for info in infos} == {(0, 0, 0, 0o444, "")}
    found = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert {each["__key__"]: {"png": each["png"], "left.cls": each["left.cls"]} for each in found} == SAMPLES


def test_shards_stay_below_both_limits(tmp_path: Path) -> None:
    assert write(str(tmp_path / "samples"), samples_per_shard=12) == [12, 12, 6]
    sizes = write(str(tmp_path / "bytes"), bytes_per_shard=20_480)
    shards = load_manifest(str(tmp_path / "bytes")).shards
    assert sum(sizes) == 30
    assert len(sizes) > 2
    assert all(shard.bytes <= 20_480 for shard in shards)


def test_a_sample_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), bytes_per_shard=10_240) as writer:
        for key, size in (("a", 10), ("b", 90_000), ("c", 10), ("d", 10)):
            writer.write(key, {"bin": bytes(size)})
    assert [shard.samples for shard in load_manifest(str(tmp_path)).shards] == [1, 1, 2]


def test_long_names_are_kept(tmp_path: Path) -> None:
    keys = ["d" * 120 + "/" + "n" * 90, "x" * 250, "ä" * 70]
    with ShardWriter(str(tmp_path)) as writer:
        for key in keys:
            writer.write(key, {"cls": b"1"})
    index = ShardIndex.from_bytes((tmp_path / "shard-000000.tar.idx").read_bytes())
    assert [index.key(place) for place in range(3)] == keys
    found = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in found] == keys


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    data = bytes(1 << 20)
    tracemalloc.start()
    with ShardWriter(str(tmp_path)) as writer:
        for number in range(48):
            writer.write(str(number), {"bin": data})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the copy to the URL goes by 16 MiB at a time
    assert peak < 40 << 20
    assert len(load_manifest(str(tmp_path)).shards) == 1


def test_a_block_that_fails_leaves_no_data_set(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(str(tmp_path / "d"), samples_per_shard=2) as writer:
            for number in range(5):
                writer.write(str(number), {"cls": b"1"})
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        interrupted()
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == [
        f"shard-00000{shard}.tar{end}" for shard in (0, 1) for end in ("", ".idx")
    ]


def test_shards_go_to_s3(s3: S3Server) -> None:
    assert write("s3://data/writer", samples_per_shard=20) == [20, 10]
    assert storage.size("s3://data/writer/shard-000001.tar") == load_manifest("s3://data/writer").shards[1].bytes


@pytest.mark.parametrize(
    ("key", "fields", "reason"),
    [
        ("a.b", {"cls": b"1"}, "text without dots"),
        ("", {"cls": b"1"}, "no name"),
        ("/a", {"cls": b"1"}, "not beginning with a slash"),
        ("a\n", {"cls": b"1"}, "no name"),
        ("a", {}, "give bytes by extension"),
        ("a", {"cls": "1"}, "give bytes by extension"),
        ("a", {"CLS": b"1"}, "lower-case extensions"),
        ("a", {"": b"1"}, "would not be read as field"),
        ("a", {"x/y": b"1"}, "would not be read as field"),
        ("__a__/b", {"cls": b"1"}, "do not begin with two underscores"),
    ],
)
def test_what_no_reader_would_find_again_is_refused(
    tmp_path: Path, key: str, fields: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(UserError, match=reason), ShardWriter(str(tmp_path)) as writer:
        writer.write(key, fields)


def test_a_data_set_is_not_written_over(tmp_path: Path) -> None:
    write(str(tmp_path))
    with pytest.raises(UserError, match="there is a data set at"):
        ShardWriter(str(tmp_path))
    with pytest.raises(UserError, match="holds nothing; give more"):
        ShardWriter(str(tmp_path / "other"), samples_per_shard=0)
