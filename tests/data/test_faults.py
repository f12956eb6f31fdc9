"""Streaming through faults: every sample once, in the same order, or one clear error."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain.config import Storage
from dltrain.data.cache import NodeCache
from dltrain.data.dataset import Cache, open_dataset
from dltrain.data.loader import Loader
from dltrain.data.mixture import MixedDataset, Source
from dltrain.data.order import Order
from dltrain.data.sample import Sample
from dltrain.data.windows import Window
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.storage import s3_client
from dltrain.testing.faulty_s3 import Faults, FaultyS3

SAMPLES, SHARDS, SIZE = 240, 12, 60_000
URL = "s3://data/set"
KEYS = [f"{number:04d}" for number in range(SAMPLES)]


def content(key: str) -> bytes:
    return random.Random(key).randbytes(SIZE)


def write(url: str, count: int = SAMPLES) -> None:
    with ShardWriter(url, samples_per_shard=SAMPLES // SHARDS) as writer:
        for key in KEYS[:count]:
            writer.write(key, {"bin": content(key)})


pytestmark = pytest.mark.usefixtures("no_faults")


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with FaultyS3(buckets=("data",)) as server:
        write(URL)
        yield server


def checked(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
    """The key as a number, once all bytes have been compared."""
    assert sample.fields["bin"] == content(sample.key)
    return {"number": np.int64(sample.key)}


def loader(folder: Path | str, url: str = URL, **options: Any) -> Loader:
    dataset = open_dataset(url, cache=Cache(str(folder), options.pop("budget", 0)))
    order = Order(dataset.shard_sizes, seed=5, lanes=4, window=options.pop("window", 16))
    return Loader(dataset, order, checked, global_batch_size=24, **options)


def numbers(source: Loader, steps: int = 20) -> list[int]:
    """What the next steps bring: two epochs of ten steps by default."""
    found: list[int] = []
    batches = iter(source)
    for _ in range(steps):
        found += next(batches).fields["number"].tolist()
    batches.close()
    return found


@pytest.fixture(scope="module")
def expected(server: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    found = numbers(loader(tmp_path_factory.mktemp("clean")))
    assert sorted(found[:SAMPLES]) == sorted(found[SAMPLES:]) == list(range(SAMPLES))
    return found


@pytest.mark.parametrize("folder", ["cache", "off"])
@pytest.mark.parametrize(
    "faults",
    [
        Faults(slow_down=3),
        Faults(cut_after=250_000),
        Faults(timeout_share=0.01, seed=3),
        Faults(truncate=3),
        Faults(slow_down_share=0.05, latency=0.005),
        Faults(flip_bit="set/*.tar", flip_next=2),
    ],
    ids=["503 three times", "cuts", "1% time out", "short bodies", "5% slow down", "bits flipped on the way"],
)
def test_faults_on_the_way_change_nothing(
    server: FaultyS3, expected: list[int], tmp_path: Path, folder: str, faults: Faults
) -> None:
    source = loader(folder if folder == "off" else tmp_path / folder)
    server.set(faults)
    assert numbers(source) == expected


def test_workers_stream_the_same_through_faults(server: FaultyS3, expected: list[int], tmp_path: Path) -> None:
    server.set(Faults(cut_after=250_000, slow_down_share=0.02))
    assert numbers(loader(tmp_path, workers=2)) == expected


def test_each_shard_is_downloaded_once_for_all_ranks_and_epochs(
    server: FaultyS3, expected: list[int], tmp_path: Path
) -> None:
    sources = [loader(tmp_path, rank=rank, ranks=3) for rank in range(3)]
    shares = [numbers(source) for source in sources]
    together = [number for step in range(20) for r in range(8) for number in [s[step * 8 + r] for s in shares]]
    assert together == expected  # position p is rank p % 3's, and a step begins at a multiple of 3
    parts = [(record.key, record.range) for record in server.requests() if record.key.endswith(".tar")]
    assert len(parts) == len(set(parts)) == 2 * SHARDS  # of 1.2 MB, in parts of 1 MiB


def test_a_token_that_expires_in_the_middle_of_an_epoch(
    server: FaultyS3, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    keys.write_text(text.format("old"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3_client.forget()
    source = loader("off")
    found = numbers(source, 5)
    server.set(Faults(expire_after=0, expired=("old",)))
    keys.write_text(text.format("new"))
    assert found + numbers(source, 15) == expected


def test_a_bit_flipped_in_a_cached_shard_is_found_and_the_shard_fetched_again(
    server: FaultyS3, expected: list[int], tmp_path: Path
) -> None:
    numbers(loader(tmp_path))
    for entry in NodeCache(tmp_path).entries():
        data = bytearray((tmp_path / entry.name).read_bytes())
        data[len(data) // 2] ^= 4
        (tmp_path / entry.name).write_bytes(data)
    server.forget()
    assert numbers(loader(tmp_path)) == expected
    assert len([record for record in server.requests() if record.key.endswith(".tar")]) >= SHARDS - 1


def test_a_bit_flipped_at_the_source_is_an_error_that_names_it(server: FaultyS3, tmp_path: Path) -> None:
    server.set(Faults(flip_bit="set/shard-000003.tar"))
    with pytest.raises(
        UserError, match=r"sample '00[67]\d' of shard s3://data/set/shard-000003\.tar is damaged .*bytes \d"
    ):
        numbers(loader(tmp_path))


def test_bad_samples_within_a_budget_are_replaced_on_every_rank_alike(
    server: FaultyS3, expected: list[int], tmp_path: Path
) -> None:
    server.set(Faults(flip_bit="set/shard-000003.tar"))
    list_of_rank = tmp_path / "bad" / "rank-00000.jsonl"
    alone = loader(tmp_path / "a", bad_samples=2, quarantine=list_of_rank)
    found = numbers(alone)
    differ = [place for place in range(len(found)) if found[place] != expected[place]]
    assert len(differ) == 4  # one bit in each of the shard's two parts, and two epochs
    assert {expected[place] for place in differ[:2]} == {expected[place] for place in differ[2:]}
    lines = [json.loads(line) for line in list_of_rank.read_text().splitlines()]
    assert [line["position"] for line in lines] == differ[:2]  # the second epoch meets the same
    assert [line["replaced_by"] - line["position"] for line in lines] == [4] * 2
    assert [line["shard"] for line in lines] == [3, 3]
    assert all("shard-000003.tar is damaged" in line["reason"] for line in lines)
    assert numbers(loader(tmp_path / "a", bad_samples=2, quarantine=list_of_rank.with_stem("rank-00001"))) == found
    assert [file.name for file in list_of_rank.parent.iterdir()] == [list_of_rank.name]  # a run that starts again
    for _ in range(2):  # the one too many is not forgiven by a start
        with pytest.raises(
            UserError, match=r"2 samples are bad and data\.bad_samples allows 1: .*others are listed in"
        ):
            numbers(loader(tmp_path / "a", bad_samples=1, quarantine=tmp_path / "few" / "rank-00000.jsonl"))
    shares = [numbers(loader(tmp_path / "b", rank=rank, ranks=2, bad_samples=4)) for rank in range(2)]
    assert [number for pair in zip(*shares, strict=True) for number in pair] == found
    with pytest.raises(UserError, match=r"2 samples are bad and data\.bad_samples allows 1: .*is damaged"):
        numbers(loader(tmp_path / "c", bad_samples=1))


def test_a_cache_too_small_says_how_much_it_takes(server: FaultyS3, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"need 0\.\d+ GiB: give data\.cache_gib at least that"):
        loader(tmp_path, budget=2_000_000)


def test_a_small_cache_is_enough_where_windows_are_small(server: FaultyS3, tmp_path: Path) -> None:
    found = numbers(loader(tmp_path, window=2, budget=13_000_000))
    assert sorted(found[:SAMPLES]) == sorted(found[SAMPLES:]) == list(range(SAMPLES))
    assert sum(entry.bytes for entry in NodeCache(tmp_path).entries()) <= 13_000_000
    parts = [record for record in server.requests() if record.key.endswith(".tar")]
    assert len(parts) <= 2 * (2 * SHARDS)  # what was evicted came again in the second epoch alone


def test_what_the_data_cost_is_seen(server: FaultyS3, tmp_path: Path) -> None:
    source = loader(tmp_path, workers=1)
    server.set(Faults(slow_down=2))
    numbers(source)
    seen = source.seen()
    assert seen["data/first_batch_seconds"] > 0
    assert seen["data/retries"] == seen["data/throttled"] == 2
    assert seen["data/requests"] == 2 + SHARDS * 3  # two parts of each shard, and its index
    assert source.gauge.total.bytes > SAMPLES * SIZE
    assert 0 < seen["data/cache_hits"] <= 1  # all of them where the prefetcher was quick
    assert seen["data/read_ms"] > 0
    assert seen["data/decode_ms"] > 0
    assert source.seen()["data/requests"] == 0


def test_a_cold_start_reads_ranges_rather_than_wait_for_shards(
    server: FaultyS3, expected: list[int], tmp_path: Path
) -> None:
    server.set(Faults(bandwidth=1e6))  # 1.2 MB shards: more than a second each
    source = loader(tmp_path)
    source._fetch.dataset.reader.files._bandwidth = 1e6
    began = time.monotonic()
    assert numbers(source, 1) == expected[:24]
    assert time.monotonic() - began < 1.5
    server.set(Faults())
    assert numbers(source, 19) == expected[24:]


RANK = """
import json, sys
from pathlib import Path
from tests.data.test_faults import loader
folder, log, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
source = loader(folder, rank=rank, ranks=4, node=rank % 2, nodes=2, budget=14_000_000)
lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
if lines:
    source.load_state_dict(lines[-1]["state"])
with log.open("a") as file:
    for _, batch in zip(range(60 - len(lines)), source):
        file.write(json.dumps({"numbers": batch.fields["number"].tolist(), "state": source.state_dict()}) + "\\n")
        file.flush()
"""


@pytest.mark.slow
def test_two_nodes_on_one_cache_with_one_killed_again_and_again(server: FaultyS3, tmp_path: Path) -> None:
    server.set(Faults(latency=0.02, bandwidth=5e6))
    chance = random.Random(1)

    def start(rank: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", RANK, str(tmp_path / "cache"), str(tmp_path / f"{rank}.jsonl"), str(rank)]
        return subprocess.Popen(words, cwd=Path(__file__).parents[2])

    ranks = [start(rank) for rank in range(4)]
    deadline, kills = time.monotonic() + 100, 0
    while any(process.poll() is None for process in ranks):
        assert time.monotonic() < deadline
        time.sleep(1.0)
        rank = chance.randrange(4)
        if kills < 12 and ranks[rank].poll() is None:
            ranks[rank].send_signal(signal.SIGKILL)
            ranks[rank].wait()
            ranks[rank], kills = start(rank), kills + 1
    assert [process.returncode for process in ranks] == [0] * 4
    order = Order((SAMPLES // SHARDS,) * SHARDS, seed=5, lanes=4, window=16)
    shards, indices = order.locate(np.arange(60 * 24))
    whole = (shards * (SAMPLES // SHARDS) + indices).tolist()
    for rank in range(4):
        lines = (tmp_path / f"{rank}.jsonl").read_text().splitlines()
        assert [number for line in lines for number in json.loads(line)["numbers"]] == whole[rank::4]
    assert kills >= 3


def test_a_failed_part_is_the_error_and_nobody_writes_after_it(
    server: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parts are refused while others still stream: the cache gives its map back only when all have ended."""
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=1.0, attempts=3).model_dump_json())
    server.set(Faults(bandwidth=2e6, expire_after=2))
    source = loader(tmp_path)
    with pytest.raises(UserError, match=r"ExpiredToken|refused the credentials"):
        numbers(source)


def test_what_is_fetched_ahead_from_a_dead_store_ends_with_its_reader(
    server: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=1.0, attempts=1000).model_dump_json())
    source = loader(tmp_path)
    server.set(Faults(slow_down_share=1.0))
    source._fetch.dataset.advance(0)
    while not server.requests():
        time.sleep(0.01)
    ahead = [thread for thread in threading.enumerate() if thread.name == "dltrain-ahead"]
    assert ahead
    source._fetch.rest()
    for thread in ahead:
        thread.join(2.0)
    assert not any(thread.is_alive() for thread in ahead)


@pytest.mark.slow
def test_a_body_that_stalls_is_told_and_not_the_map_it_was_read_into(
    server: FaultyS3, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1, timeout=0.5, attempts=2).model_dump_json())
    source = loader(tmp_path)
    server.set(Faults(bandwidth=50, keys="set/*.tar"))
    with pytest.raises(UserError, match="2 attempts"):
        numbers(source)
    server.set(Faults())
    monkeypatch.setenv("DLTRAIN_STORAGE", Storage(part_mib=1).model_dump_json())
    assert numbers(source) == expected


def test_windows_of_a_damaged_series_are_an_error(server: FaultyS3, tmp_path: Path) -> None:
    series = io.BytesIO()
    np.save(series, np.zeros((1000, 2), np.float32))
    with ShardWriter("s3://data/series") as writer:
        writer.write("one", {"npy": series.getvalue()})
    server.set(Faults(flip_bit="series/*.tar"))
    dataset = open_dataset("s3://data/series", Window(lookback=8, horizon=2), Cache(str(tmp_path)))
    with pytest.raises(UserError, match=r"sample 'one' of shard s3://data/series/.* is damaged"):
        dataset.read(np.zeros(4, np.int64), np.arange(4))


def test_a_rank_with_workers_does_not_fetch_ahead_itself(server: FaultyS3, tmp_path: Path) -> None:
    source = loader(tmp_path, workers=1)
    source.peek()
    assert source._fetch.dataset.reader.files._prefetcher is None


def test_a_mixture_with_a_source_smaller_than_its_lanes_is_fetched_ahead(server: FaultyS3, tmp_path: Path) -> None:
    with ShardWriter("s3://data/few") as writer:
        for key in KEYS[:5]:
            writer.write(key, {"bin": content(key)})
    sources = (Source(URL, weight=3), Source("s3://data/few", weight=1))
    mixed = MixedDataset(sources, [open_dataset(source.url, cache=Cache(str(tmp_path))) for source in sources])
    source = Loader(mixed, mixed.order(seed=1, lanes=16, window=8), checked, global_batch_size=24)
    assert len(numbers(source, 30)) == 30 * 24


def test_a_cache_cleared_in_the_middle_is_filled_again(server: FaultyS3, expected: list[int], tmp_path: Path) -> None:
    source, found = loader(tmp_path / "cache"), []
    for _, batch in zip(range(20), source, strict=False):
        found += batch.fields["number"].tolist()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert found == expected


def test_a_full_disk_is_one_sentence(server: FaultyS3, small_disk: Path) -> None:
    source = loader(small_disk, budget=1 << 30)  # as the user thought
    with pytest.raises(UserError, match=r"the disk of .*disk is full: s3://data/set/shard-\d+\.tar needs \d+ bytes"):
        numbers(source)
