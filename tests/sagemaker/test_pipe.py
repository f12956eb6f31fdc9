"""Pipe mode: FIFOs of an epoch each, read once, in the order of arrival, by all ranks of a host together."""

from __future__ import annotations

import gzip
import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dltrain.config import Config, Data
from dltrain.data.decode import decode_fields
from dltrain.data.formats.recordio import encode_record, write_records
from dltrain.data.loader import Loader
from dltrain.data.sample import Sample
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import Channel
from dltrain.sagemaker.opening import Opened, open_special
from dltrain.sagemaker.pipe import ENDLESS, Epochs, read_samples
from dltrain.testing.ranks import run_ranks

SAMPLES = 12
KEYS = [f"k{place:02d}" for place in range(SAMPLES)]


def arrays(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
    return decode_fields(replace(sample, fields={"cls": sample.fields["cls"]}))


def shards(folder: Path, extra: int = 0) -> Path:
    """Three shards; with ``extra`` bytes in every sample."""
    with ShardWriter(str(folder), samples_per_shard=5, facts={"classes": ["a"]}) as writer:
        for place, key in enumerate(KEYS):
            writer.write(key, {"cls": b"%d" % place, "bin": bytes([65 + place]) * extra})
    return folder


def tars(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.tar")))


@contextmanager
def feeding(folder: Path, epochs: list[bytes], late: float = 0.0) -> Iterator[None]:
    """Offer one FIFO after the other as SageMaker does, each when the one before has been read."""

    def feed() -> None:
        for number, data in enumerate(epochs):
            time.sleep(late)
            path = f"{folder}_{number}"
            os.mkfifo(path)
            try:
                with open(path, "wb") as fifo:
                    fifo.write(data)
            except BrokenPipeError:  # a training may end before its epoch does
                return

    threading.Thread(target=feed, daemon=True).start()
    yield


def opened(channel: Channel, environment: Environment | None = None, index: Path | None = None) -> Opened:
    known = {channel.name: channel}
    if index is not None:
        known[f"{channel.name}-index"] = Channel(f"{channel.name}-index", index)
    config = Config(data=Data(train=str(channel.folder)))
    found = open_special(config, known, environment or Environment(), lambda value: [value])
    assert found is not None
    return found


def steps(data: Opened, batch: int, count: int, rank: int = 0, ranks: int = 1) -> list[Any]:
    loader = Loader(data.dataset, data.order, arrays, global_batch_size=batch, rank=rank, ranks=ranks)
    peeked = loader.peek().keys
    found = [batch for _, batch in zip(range(count), loader, strict=False)]
    assert found[0].keys == peeked
    return found


def test_samples_come_as_they_arrive_epoch_after_epoch(tmp_path: Path) -> None:
    data, channel = shards(tmp_path / "data"), Channel("train", tmp_path / "train", "Pipe")
    with feeding(channel.folder, [tars(data)] * 3, late=0.1):
        batches = steps(opened(channel), 5, 6)
    keys = [key for batch in batches for key in batch.keys]
    assert keys == (3 * KEYS)[:30]
    assert [int(value) for batch in batches for value in batch.fields["cls"]] == (3 * list(range(SAMPLES)))[:30]
    assert [int(place) for batch in batches for place in batch.position] == list(range(30))


def test_a_manifest_beside_the_pipe_tells_facts_and_the_length_of_an_epoch(tmp_path: Path) -> None:
    data, channel = shards(tmp_path / "data"), Channel("train", tmp_path / "train", "Pipe")
    known, unknown = opened(channel, index=data), opened(channel)
    assert (known.dataset.facts, known.order.samples) == ({"classes": ["a"]}, SAMPLES)
    assert (unknown.dataset.facts, unknown.order.samples) == ({}, ENDLESS)
    assert "channel 'train' is a Pipe: an exact resume" in known.caution


def rank_body(rank: int, folder: str, extra: int, hosts: int, sharded: bool) -> list[str]:
    """One rank of ``hosts`` hosts: three steps, and a collective after each."""
    world = dist.get_world_size()
    local = world // hosts
    environment = Environment(rank, world, rank % local, local)
    name = f"train{environment.node}"  # the hosts of a test share a machine
    kind = "ShardedByS3Key" if sharded else "FullyReplicated"
    data = opened(Channel(name, Path(folder) / name, "Pipe", kind), environment)
    data_rank = environment.local_rank * hosts + environment.node
    loader = Loader(data.dataset, data.order, arrays, global_batch_size=2 * world, rank=data_rank, ranks=world)
    keys: list[str] = []
    for _, batch in zip(range(3), loader, strict=False):
        total = torch.tensor(float(len(batch)))
        dist.all_reduce(total)  # no rank goes on before all have their batch
        assert total == 2 * world
        keys += batch.keys
    return keys


@pytest.mark.parametrize(("hosts", "world", "sharded"), [(1, 3, False), (2, 4, True), (2, 4, False)])
def test_ranks_of_a_host_share_its_pipe_in_step(tmp_path: Path, hosts: int, world: int, sharded: bool) -> None:
    data = shards(tmp_path / "data", extra=700_000)  # more than lies in any pipe between them
    with feeding(tmp_path / "train0", [tars(data)] * 4), feeding(tmp_path / "train1", [tars(data)] * 4):
        keys = run_ranks(rank_body, world, str(tmp_path), 700_000, hosts, sharded)
    taken, local = 6 * world, world // hosts
    if not sharded:  # one stream: together the ranks have each of its first samples
        assert sorted(chain.from_iterable(keys)) == sorted((4 * KEYS)[:taken])
        return
    for host in range(hosts):  # streams of their own: each host all of its first samples
        mine = chain.from_iterable(keys[host * local : (host + 1) * local])
        assert sorted(mine) == sorted((4 * KEYS)[: taken // hosts])


def wrapped(*objects: bytes) -> bytes:
    file = io.BytesIO()
    write_records(file, objects)
    return file.getvalue()


def all_samples(data: bytes, channel: Channel) -> list[tuple[str, dict[str, bytes]]]:
    return list(read_samples(io.BufferedReader(io.BytesIO(data)), channel))  # type: ignore[type-var]


def test_every_kind_of_stream_gives_the_same_samples(tmp_path: Path) -> None:
    data, channel = shards(tmp_path / "data"), Channel("train", tmp_path / "train", "Pipe")
    expected = all_samples(tars(data), channel)
    assert [(key, fields["cls"]) for key, fields in expected] == [(k, b"%d" % n) for n, k in enumerate(KEYS)]
    objects = [file.read_bytes() for file in sorted(data.iterdir())]  # manifest and indexes among them
    assert all_samples(wrapped(*objects), replace(channel, record_wrapper="RecordIO")) == expected
    packed = b"".join(gzip.compress(file.read_bytes()) for file in sorted(data.glob("*.tar")))
    assert all_samples(packed, channel) == expected
    assert all_samples(bytes(512 * 7) + tars(data) + bytes(512), channel) == expected


def test_records_of_protocol_buffers_are_samples(tmp_path: Path) -> None:
    rows = [np.arange(3, dtype=np.float32) + place for place in range(4)]
    stream = wrapped(*(encode_record({"values": row}, {"values": row[:1]}) for row in rows))
    channel = Channel("train", tmp_path / "train", "Pipe", content_type="application/x-recordio-protobuf")
    found = all_samples(stream, channel)
    assert [key for key, _ in found] == [f"train/{place:08d}" for place in range(4)]
    for row, (_, fields) in zip(rows, found, strict=True):
        assert np.array_equal(np.load(io.BytesIO(fields["npy"])), row)


@pytest.mark.parametrize(
    ("stream", "change", "sentence"),
    [
        (lambda data: tars(data) + (data / "manifest.json").read_bytes() * 3, {}, "else than tars behind 3 of them"),
        (lambda data: tars(data)[:-8_500], {}, "tar 2 of channel 'train' is truncated"),
        (lambda data: wrapped(b"\x89PNG" * 200), {"record_wrapper": "RecordIO"}, "object 0 .* is no tar"),
        (lambda data: b"x" * 100, {"content_type": "application/x-recordio-protobuf"}, "has no record at byte 0"),
        (lambda data: wrapped(b"xyz"), {"content_type": "application/x-recordio-protobuf"}, "record 0 .* cannot be"),
        (lambda data: gzip.compress(tars(data))[:300], {}, "cannot be read on"),
    ],
)
def test_what_is_no_stream_of_samples_is_told(tmp_path: Path, stream: Any, change: Any, sentence: str) -> None:
    channel = replace(Channel("train", tmp_path / "train", "Pipe"), **change)
    with pytest.raises(UserError, match=sentence):
        all_samples(stream(shards(tmp_path / "data", extra=600)), channel)


def test_an_empty_or_absent_fifo_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    with pytest.raises(UserError, match=r"train_0 has not appeared in 0 s; is the channel a Pipe"):
        Epochs(folder, patience=0.05).read(1)
    with feeding(folder, [b""]), pytest.raises(UserError, match=r"train_0 brought nothing"):
        Epochs(folder).read(1)


def test_all_ranks_are_told_when_a_pipe_fails(tmp_path: Path) -> None:
    channel, answers = Channel("train", tmp_path / "train", "Pipe"), dict[int, str]()

    def read(rank: int) -> None:
        try:
            steps(opened(channel, Environment(rank, 2, rank, 2)), 4, 1, rank, 2)
        except UserError as error:
            answers[rank] = str(error)

    with feeding(channel.folder, [b""]):
        threads = [threading.Thread(target=read, args=(rank,)) for rank in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert "train_0 brought nothing" in answers[0]
    assert "the first rank of this host no longer reads" in answers[1]
