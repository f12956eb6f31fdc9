"""Data sets are built the same by any number of processes and after any interruption; verifying finds all damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain import storage
from dltrain.data.building.build import build_shards, plan_parts
from dltrain.data.building.indexing import index_shards
from dltrain.data.building.jobs import Report, run_jobs
from dltrain.data.building.resharding import open_reshard
from dltrain.data.building.verifying import check_keys, verify_shards
from dltrain.data.dataset import open_dataset
from dltrain.data.formats import recordio, tfrecord
from dltrain.data.formats.opening import open_source
from dltrain.data.manifest import load_manifest
from dltrain.data.writer import Limits, ShardWriter
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

BYTES = 30_720
"""Of a shard in these tests: three records of a tar, some twelve samples."""


def write_tars(root: Path, tars: int = 7, samples: int = 30) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for tar in range(tars):
        with ShardWriter(str(root / "made")) as writer:
            for number in range(samples):
                writer.write(f"{tar}/{number:04d}", {"bin": bytes([tar, number]) * 300, "cls": b"%d" % tar})
        (root / "made" / "shard-000000.tar").rename(root / f"{tar}.tar")
        shutil.rmtree(root / "made")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def keys(url: str) -> list[str]:
    dataset = open_dataset(url)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    samples = dataset.read(*(np.array(column) for column in zip(*places, strict=True)))
    assert all(sample.fields["bin"][:1] == b"%c" % int(sample.fields["cls"]) for sample in samples)
    return [sample.key for sample in samples]


class Counted:
    """A source of samples that are one piece each."""

    counted = True
    identity = "counted"
    facts: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, sizes: list[int], counted: bool = True) -> None:
        self._sizes, self.counted = sizes, counted

    def sizes(self) -> Any:
        return np.array(self._sizes, dtype=np.int64)

    def read(self, start: int, stop: int, skip: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
        for place in range(start + skip, stop):
            yield str(place), {"bin": bytes(self._sizes[place])}


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=60), st.integers(1, 9000), st.none() | st.integers(1, 20), st.booleans())
def test_parts_cover_the_source_once_and_in_order(
    sizes: list[int], size: int, samples: int | None, counted: bool
) -> None:
    parts = plan_parts(Counted(sizes, counted), Limits(samples, size))
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(len(sizes)))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert all(part.start < part.stop for part in parts)
    if counted and samples:
        assert all((part.stop - part.start) % samples == 0 for part in parts[:-1])


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    source = open_source(str(write_tars(tmp_path / "in")))
    one = build_shards(source, str(tmp_path / "one"), limits=Limits(bytes=BYTES))
    three = build_shards(source, str(tmp_path / "three"), limits=Limits(bytes=BYTES), workers=3)
    assert one.fingerprint == three.fingerprint
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert max(shard.bytes for shard in one.shards) <= BYTES
    assert len(plan_parts(source, Limits(bytes=BYTES))) > 1
    assert keys(str(tmp_path / "one")) == [f"{tar}/{number:04d}" for tar in range(7) for number in range(30)]


SLOW = """
import sys, time
from dltrain.data.building.build import build_shards
from dltrain.data.formats.opening import ReadTar, open_source
from dltrain.data.writer import Limits

class Slow(ReadTar):
    def __call__(self, url):
        for sample in super().__call__(url):
            time.sleep(0.005)
            yield sample

if __name__ == "__main__":
    source = open_source(sys.argv[1])
    source._read_file = Slow()
    build_shards(source, sys.argv[2], limits=Limits(bytes=int(sys.argv[3])), workers=2)
"""


def recorded_shards(target: Path) -> list[Path]:
    """What a build that is under way has written down as finished."""
    records = [json.loads(file.read_text()) for file in target.glob(".building-*.json")]
    return [target / shard["name"] for record in records for shard in record["shards"]]


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    source = open_source(str(write_tars(tmp_path / "in", tars=6)))
    target = tmp_path / "out"
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "in"), str(target), str(BYTES)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while len(recorded_shards(target)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "manifest.json").exists()
    recorded = recorded_shards(target)
    assert len(recorded) >= 3
    written = {file: file.stat().st_mtime_ns for file in recorded}
    whole = build_shards(source, str(tmp_path / "whole"), limits=Limits(bytes=BYTES))
    resumed = build_shards(source, str(target), limits=Limits(bytes=BYTES))
    assert resumed.fingerprint == whole.fingerprint
    assert contents(target) == contents(tmp_path / "whole")  # no record is left, and no half of anything
    assert {file: file.stat().st_mtime_ns for file in recorded} == written


class FailsOnce(Counted):
    """Reading stops at one sample until ``mended``."""

    def __init__(self, sizes: list[int], at: int) -> None:
        super().__init__(sizes)
        self.at: int | None = at
        self.begun: list[int] = []

    def read(self, start: int, stop: int, skip: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
        self.begun.append(start + skip)
        for sample in super().read(start, stop, skip):
            if sample[0] == str(self.at):
                raise UserError("the network is gone")
            yield sample


def test_what_is_damaged_after_an_interruption_is_written_again(tmp_path: Path) -> None:
    source = FailsOnce([2000] * 40, at=33)
    limits = Limits(samples=5)
    with pytest.raises(UserError, match="the network is gone"):
        build_shards(source, str(tmp_path / "out"), limits=limits)
    with pytest.raises(UserError, match="unfinished work on other samples, or with other limits"):
        build_shards(source, str(tmp_path / "out"), limits=Limits(samples=6))
    # parts are of four shards, 20 samples: the second one has written samples 20 to 29 and held 30 to 32
    (tmp_path / "out" / "shard-00001-001.tar").write_bytes(b"cut off")
    source.at, source.begun = None, []
    manifest = build_shards(source, str(tmp_path / "out"), limits=limits)
    assert source.begun == [25]
    assert manifest.fingerprint == build_shards(source, str(tmp_path / "again"), limits=limits).fingerprint
    verify_shards(str(tmp_path / "out"))


def test_a_build_ends_with_its_data_set(tmp_path: Path) -> None:
    source = Counted([100] * 3)
    build_shards(source, str(tmp_path))
    with pytest.raises(UserError, match="there is a data set at"):
        build_shards(source, str(tmp_path))
    with pytest.raises(UserError, match="there are no samples to write"):
        build_shards(Counted([]), str(tmp_path / "empty"))
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(UserError, match="holds nothing; give more"):
        Limits(samples=0)


def test_a_data_set_is_written_anew_in_other_shards(tmp_path: Path) -> None:
    index_shards(str(write_tars(tmp_path / "in")))
    first = build_shards(open_reshard(str(tmp_path / "in")), str(tmp_path / "same"), limits=Limits(samples=16))
    assert [shard.samples for shard in first.shards] == [16] * 13 + [2]
    order = keys(str(tmp_path / "in"))
    assert keys(str(tmp_path / "same")) == order
    limits = Limits(samples=16)
    seeds = {
        seed: build_shards(open_reshard(str(tmp_path / "in"), seed), str(tmp_path / f"s{seed}"), limits=limits)
        for seed in (1, 2)
    }
    again = build_shards(open_reshard(str(tmp_path / "in"), 1), str(tmp_path / "again"), limits=limits)
    assert again.fingerprint == seeds[1].fingerprint != seeds[2].fingerprint
    shuffled = keys(str(tmp_path / "s1"))
    assert shuffled != order
    assert sorted(shuffled) == order


def test_shards_are_built_on_s3_by_two_processes(s3: S3Server, tmp_path: Path) -> None:
    for file in write_tars(tmp_path / "in", tars=5).iterdir():
        storage.upload(file, f"s3://data/tars/{file.name}")
    index_shards("s3://data/tars", at="s3://data/index")
    assert [url for url in storage.listing("s3://data/tars") if not url.endswith(".tar")] == []
    local = build_shards(open_source(str(tmp_path / "in")), str(tmp_path / "local"), limits=Limits(bytes=BYTES))
    limits = Limits(bytes=BYTES)
    remote = build_shards(open_source("s3://data/tars"), "s3://data/built", limits=limits, workers=2)
    assert remote.fingerprint == local.fingerprint
    anew = build_shards(open_reshard("s3://data/index"), "s3://data/anew", limits=Limits(samples=50))
    assert keys("s3://data/anew") == keys("s3://data/index") == keys(str(tmp_path / "local"))
    assert verify_shards("s3://data/anew") == anew


# indexing


@pytest.mark.parametrize("format", ["tfrecord", "recordio"])
def test_records_are_read_where_they_lie(tmp_path: Path, format: str) -> None:
    module = {"tfrecord": tfrecord, "recordio": recordio}[format]
    suffix = {"tfrecord": "tfrecord", "recordio": "rec"}[format]
    for number in range(3):
        with (tmp_path / f"part-{number}.{suffix}").open("wb") as file:
            module.write_records(file, [b"%d-%d" % (number, record) for record in range(4)])
    manifest = index_shards(str(tmp_path), str(tmp_path / "index"))
    assert {shard.format for shard in manifest.shards} == {format}
    samples = open_dataset(str(tmp_path / "index")).read(np.array([2, 0]), np.array([3, 1]))
    assert [(sample.key, list(sample.fields.values())) for sample in samples] == [
        ("part-2/00000003", [b"2-3"]),
        ("part-0/00000001", [b"0-1"]),
    ]
    verify_shards(str(tmp_path / "index"))


def test_an_index_elsewhere_has_the_fingerprint_of_one_beside(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", tars=2)
    elsewhere = index_shards(str(tmp_path / "in"), str(tmp_path / "index"))
    beside = index_shards(str(tmp_path / "in"))
    assert elsewhere.fingerprint == beside.fingerprint
    assert index_shards(str(tmp_path / "in")).fingerprint == beside.fingerprint  # and may be made again
    assert keys(str(tmp_path / "index")) == keys(str(tmp_path / "in"))


def test_indexing_goes_on_where_it_was(tmp_path: Path) -> None:
    write_tars(tmp_path, tars=3)
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[:5130] + b"x" + whole[5131:])  # in the header at 5120
    with pytest.raises(UserError, match=r"2\.tar has a damaged header"):
        index_shards(str(tmp_path))
    before = (tmp_path / "0.tar.idx").stat().st_mtime_ns
    (tmp_path / "2.tar").write_bytes(whole)
    (tmp_path / "1.tar").touch()  # might have other bytes
    second = (tmp_path / "1.tar.idx").stat().st_mtime_ns
    assert index_shards(str(tmp_path)).samples == 90
    assert (tmp_path / "0.tar.idx").stat().st_mtime_ns == before
    assert (tmp_path / "1.tar.idx").stat().st_mtime_ns > second
    assert not list(tmp_path.glob(".building*"))


def test_an_index_does_not_take_the_place_of_a_data_set(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", tars=1)
    build_shards(Counted([100] * 3), str(tmp_path / "d"))
    with pytest.raises(UserError, match="lies a data set with shards of its own; name another place with --at"):
        index_shards(str(tmp_path / "in"), str(tmp_path / "d"))
    index_shards(str(tmp_path / "in"), str(tmp_path / "index"))
    assert index_shards(str(tmp_path / "in"), str(tmp_path / "index")).samples == 30  # its own place it may take


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"x.txt": b"text"}, "there are no tars, TFRecord or RecordIO files at"),
        ({"x.tar": bytes(10_240)}, "the 1 files at .* hold no samples"),
        ({"x.tar": b""}, r"x\.tar is truncated: it ends at byte 0"),
        ({"x.tfrecord": b"\x1f\x8b" + bytes(20)}, r"x\.tfrecord is compressed \(gzip\)"),
    ],
)
def test_what_cannot_be_indexed_is_told(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason):
        index_shards(str(tmp_path))


# verifying


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build_shards(Counted([700] * 30), str(tmp_path / "d"), limits=Limits(samples=10))
    return tmp_path / "d"


def change(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "byte", "reason"),
    [
        (
            "shard-00000-001.tar",
            512 + 50,
            r"'bin' of sample '10' in .*-001\.tar is damaged \(bytes 512 to 1212\)",
        ),
        ("shard-00000-001.tar", 512 + 1024 + 10, r"-001\.tar has a damaged header at byte 1536, after or in 10\.bin"),
        ("shard-00000-001.tar", 512 + 800, r"-001\.tar differs from what its manifest says, outside of its members"),
        ("shard-00000-002.tar", -1, r"-002\.tar goes on behind its end"),
        ("shard-00000-002.tar.idx", 300, r"index .*-002\.tar\.idx is damaged"),
    ],
)
def test_every_damage_is_found(built: Path, name: str, byte: int, reason: str) -> None:
    verify_shards(str(built))
    change(built / name, byte)
    with pytest.raises(UserError, match=reason):
        verify_shards(str(built))


def test_a_damage_is_found_by_another_process(built: Path) -> None:
    change(built / "shard-00000-002.tar", 600)
    with pytest.raises(UserError, match=r"'bin' of sample '20' in .* is damaged"):
        verify_shards(str(built), workers=2)


def test_what_is_missing_or_too_short_is_found(built: Path) -> None:
    file = built / "shard-00000-002.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"-002\.tar has \d+ bytes, its manifest says \d+"):
        verify_shards(str(built))
    file.unlink()
    with pytest.raises(UserError, match=r"there is no file .*-002\.tar"):
        verify_shards(str(built))


def test_a_key_in_two_shards_is_found(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), samples_per_shard=3) as writer:
        for key in ("a", "b", "c", "d", "b", "e"):
            writer.write(key, {"cls": b"1"})
    with pytest.raises(UserError, match=r"sample 'b' is in .*shard-000000\.tar and in .*shard-000001\.tar"):
        verify_shards(str(tmp_path))
    with pytest.raises(UserError, match="sample 'b' is in"):
        check_keys(load_manifest(str(tmp_path)), at_once=1)  # six passes of about one key


# the processes


def work(job: str, report: Report) -> int:
    if job == "mistake":
        raise UserError("what the user did")
    if job == "fault":
        raise KeyError("ours")
    if job == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    report(1, len(job))
    return len(job)


class Watching:
    def __init__(self) -> None:
        self.jobs = self.done = self.samples = self.bytes = 0

    def begin(self, jobs: int) -> None:
        self.jobs = jobs

    def more(self, samples: int, size: int) -> None:
        self.samples += samples
        self.bytes += size

    def job_done(self) -> None:
        self.done += 1


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_done_in_order_and_watched(workers: int) -> None:
    watch, jobs = Watching(), ["a" * size for size in range(9)]
    assert run_jobs(work, jobs, workers, watch) == list(range(9))
    assert (watch.jobs, watch.done, watch.samples, watch.bytes) == (9, 9, 9, 36)


@pytest.mark.parametrize(
    ("job", "error", "reason"),
    [
        ("mistake", UserError, "what the user did"),
        ("fault", RuntimeError, "in a worker process:\n(.*\n)*KeyError: 'ours'"),
        ("death", UserError, "a worker process died"),
    ],
)
def test_what_fails_in_a_process_is_told(job: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        run_jobs(work, ["fine", job, "fine"], workers=2)
    with pytest.raises(UserError, match="--workers is 0; give 1 or more"):
        run_jobs(work, ["fine"], workers=0)
