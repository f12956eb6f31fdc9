"""A channel shared out over the hosts: all that are there train in step, each on its own shards."""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.config import Config, Data
from dltrain.data.decode import decode_fields
from dltrain.data.loader import Loader
from dltrain.data.manifest import Manifest, load_manifest
from dltrain.data.order import Order, share, step_span
from dltrain.data.sample import Sample
from dltrain.data.windows import Window
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import Channel
from dltrain.sagemaker.opening import Opened, open_special
from dltrain.sagemaker.parts import PartOrder, local_part, with_indexes

SHARDS, EACH = 7, 6


def arrays(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
    return decode_fields(sample)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    with ShardWriter(str(tmp_path / "whole"), samples_per_shard=EACH, facts={"classes": ["a"]}) as writer:
        for place in range(SHARDS * EACH - 2):  # the last shard has four
            writer.write(f"k{place:02d}", {"cls": b"%d" % place})
    return tmp_path / "whole"


def deal_out(whole: Path, hosts: int) -> list[Path]:
    """Each object to one host, as ShardedByS3Key does: shards, indexes and manifest go where they fall."""
    folders = [whole.parent / f"host{host}" / "train" for host in range(hosts)]
    for folder in folders:
        folder.mkdir(parents=True)
    files = sorted(whole.iterdir())
    random.Random(1).shuffle(files)
    for place, file in enumerate(files):
        shutil.copy(file, folders[place % hosts])
    return folders


class Ranks:
    """Ranks as threads, with a collective among them."""

    def __init__(self, hosts: int, of_host: int) -> None:
        self.environments = [
            Environment(host * of_host + rank, hosts * of_host, rank, of_host)
            for host in range(hosts)
            for rank in range(of_host)
        ]
        self._barrier = threading.Barrier(len(self.environments), timeout=20)
        self._values: dict[int, Any] = {}

    def _gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            answer = [self._values[place] for place in range(len(self.environments))]
            self._barrier.wait()
            return answer

        return gather

    def run(self, body: Callable[[Environment, Callable[[Any], list[Any]]], Any]) -> list[Any]:
        """What ``body`` returns, or the user's mistake it ends with, of every rank."""

        def one(environment: Environment) -> Any:
            try:
                return body(environment, self._gather(environment.rank))
            except UserError as error:
                return error

        with ThreadPoolExecutor(len(self.environments)) as pool:
            return list(pool.map(one, self.environments))


def opened(folders: list[Path], of_host: int, window: Window | None = None, index: bool = False) -> list[Any]:
    """The data as every rank of every host opens them."""

    def body(environment: Environment, gather: Callable[[Any], list[Any]]) -> Opened | None:
        folder = folders[environment.node]
        known = {"train": Channel("train", folder, distribution="ShardedByS3Key")}
        if index:
            known["train-index"] = Channel("train-index", folder.with_name("train-index"))
        config = Config(data=Data(train=str(folder), lanes=3, window=4))
        return open_special(config, known, environment, gather, window, folder.parent / "scratch")

    return Ranks(len(folders), of_host).run(body)


def loaders(data: list[Opened], of_host: int, batch: int) -> list[Loader]:
    """A loader for each rank, numbered across hosts first as the mesh does."""
    hosts = len(data) // of_host
    return [
        Loader(one.dataset, one.order, arrays, global_batch_size=batch, ranks=len(data), rank=rank * hosts + host)
        for place, one in enumerate(data)
        for host, rank in [divmod(place, of_host)]
    ]


@pytest.mark.parametrize(("hosts", "of_host", "batch"), [(2, 1, 4), (2, 2, 6), (3, 1, 7), (3, 2, 6)])
def test_hosts_train_in_step_and_see_each_of_their_samples_at_most_once_an_epoch(
    whole: Path, hosts: int, of_host: int, batch: int
) -> None:
    data = opened(deal_out(whole, hosts), of_host)
    sizes = [sum(one.dataset.shard_sizes) for one in data[::of_host]]
    assert sum(sizes) == SHARDS * EACH - 2
    epoch = hosts * min(sizes)
    ranks = loaders(data, of_host, batch)
    assert {loader.samples for loader in ranks} == {epoch}
    seen: list[Counter[str]] = [Counter(), Counter()]
    mine: list[set[str]] = [set() for _ in range(hosts)]
    for place, loader in enumerate(ranks):
        for batch_of_rank in loader:
            assert len(batch_of_rank) == -(-batch // len(ranks))  # of one size, whatever a host holds
            pairs = zip(batch_of_rank.keys, batch_of_rank.position.tolist(), strict=True)
            for key, position in ((key, position) for key, position in pairs if position >= 0):
                mine[place // of_host].add(key)
                if position < 2 * epoch:
                    seen[position // epoch][key] += 1
            if loader.position >= 2 * epoch:
                break
    assert len({loader.position for loader in ranks}) == 1  # as many steps everywhere
    assert all(counted.total() == epoch and max(counted.values()) == 1 for counted in seen)
    assert not set.intersection(*mine)
    if epoch < sum(sizes):
        assert set(seen[0]) != set(seen[1])  # what is left out is not always the same
        assert f"; {sum(sizes) - epoch} of {sum(sizes)} samples, other ones each time" in data[0].caution


def test_the_same_start_gives_the_same_batches(whole: Path) -> None:
    folders = deal_out(whole, 3)
    runs = [[next(iter(loader)).keys for loader in loaders(opened(folders, 1), 1, 6)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({key for keys in runs[0] for key in keys}) == 6


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4).filter(
        lambda hosts: all(sum(sizes) for sizes in hosts)
    ),
    of_host=st.integers(1, 3),
    batch=st.integers(1, 20),
    tail=st.sampled_from(["carry", "drop", "pad"]),
)
def test_every_host_takes_its_own_places_in_any_world(
    counts: list[list[int]], of_host: int, batch: int, tail: str
) -> None:
    totals, hosts = tuple(map(sum, counts)), len(counts)
    orders = [
        PartOrder(Order(tuple(sizes), seed=3, lanes=2, window=3), totals, host) for host, sizes in enumerate(counts)
    ]
    samples = orders[0].samples
    assert samples == hosts * min(totals)
    assert orders[0].left_out == sum(totals) - samples
    if tail == "drop" and samples < batch:
        return
    taken: list[list[tuple[int, int, int, int]]] = [[] for _ in range(hosts)]
    position = 0
    while position < 2 * samples:
        start, position = step_span(position, samples, batch, tail)[0], step_span(position, samples, batch, tail)[1]
        for rank in range(hosts * of_host):
            mine = share(start, position, rank, hosts * of_host)
            if not len(mine):
                continue
            shards, indices = orders[rank % hosts].locate(mine)
            taken[rank % hosts] += zip(
                (mine // samples).tolist(), mine.tolist(), shards.tolist(), indices.tolist(), strict=True
            )
    for host, rows in enumerate(taken):
        for epoch in (0, 1):
            found = [(shard, index) for number, _, shard, index in rows if number == epoch]
            assert len(found) == len(set(found)) <= min(totals)
            assert tail == "drop" or len(found) == min(totals)
            assert all(index < counts[host][shard] for shard, index in found)
    assert {position % hosts for _, position, *_ in taken[0]} <= {0}


def test_indexes_and_manifest_may_lie_in_a_channel_of_their_own(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = deal_out(whole, 2)
    for folder in folders:
        for file in [file for file in folder.iterdir() if file.suffix != ".tar"]:
            file.unlink()
        index = folder.with_name("train-index")
        index.mkdir()
        for file in whole.iterdir():
            if file.suffix != ".tar":
                shutil.copy(file, index)
    monkeypatch.setattr("dltrain.sagemaker.parts.scan_shard", None)  # nothing is indexed anew
    data = opened(folders, 2, index=True)
    assert sum(sum(one.dataset.shard_sizes) for one in data[::2]) == SHARDS * EACH - 2
    assert data[0].dataset.facts == {"classes": ["a"]}
    assert "left out" in data[0].caution


def test_a_part_keeps_its_lines_and_an_index_made_anew_is_the_same(whole: Path, tmp_path: Path) -> None:
    manifest = load_manifest(str(whole))
    folder = deal_out(whole, 2)[0]
    part = local_part(manifest, folder)
    assert 0 < len(part.shards) < SHARDS
    assert [shard.name for shard in part.shards] == sorted(file.name for file in folder.glob("*.tar"))
    assert part.shard_url(0) == str(folder / part.shards[0].name)
    copied = with_indexes(part, [whole], tmp_path / "copied")
    made = with_indexes(part, [], tmp_path / "made")
    assert made.shards == copied.shards == part.shards
    for shard in part.shards:
        assert (tmp_path / "made" / shard.index).read_bytes() == (whole / shard.index).read_bytes()


def test_windows_of_series_are_shared_out_too(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "whole"), samples_per_shard=1) as writer:
        for place in range(4):
            values = np.arange(20 + place, dtype=np.float32)
            file = tmp_path / "values.npy"
            np.save(file, values)
            writer.write(f"s{place}", {"npy": file.read_bytes()})
    data = opened(deal_out(tmp_path / "whole", 2), 1, Window(lookback=8, horizon=2))
    counts = [sum(one.dataset.shard_sizes) for one in data]
    assert sum(counts) == 11 + 12 + 13 + 14  # steps - 10 + 1 of each series
    assert data[0].order.samples == 2 * min(counts)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folders: [(f / "manifest.json").unlink(missing_ok=True) for f in folders], "no host has a manifest"),
        (lambda folders: next(folders[1].glob("*.tar")).unlink(), "1 of 7 shards of channel 'train' are on no host"),
        (lambda folders: [shutil.copy(f, folders[0]) for f in folders[1].glob("*.tar")], "is on 2 hosts, though"),
        (lambda folders: [f.unlink() for f in folders[1].glob("*.tar")], "host 1: none of the 7 shards .* lies in"),
        (lambda folders: next(folders[1].glob("*.tar")).write_bytes(b"x"), r"host 1: .*\.tar has 1 bytes where"),
        (
            lambda folders: [(f / "manifest.json").write_text(str(place)) for place, f in enumerate(folders)],
            "hosts have different manifests in channel 'train'",
        ),
    ],
)
def test_what_is_wrong_on_one_host_is_told_on_all(
    whole: Path, spoil: Callable[[list[Path]], Any], sentence: str
) -> None:
    folders = deal_out(whole, 2)
    spoil(folders)
    answers = opened(folders, 2)
    assert all(isinstance(answer, UserError) for answer in answers)
    for answer in answers:
        with pytest.raises(UserError, match=sentence):
            raise answer


def test_hosts_with_different_channels_are_told(whole: Path) -> None:
    folders = deal_out(whole, 2)

    def body(environment: Environment, gather: Callable[[Any], list[Any]]) -> Opened | None:
        distribution = ("ShardedByS3Key", "FullyReplicated")[environment.node]
        known = {"train": Channel("train", folders[0], distribution=distribution)}
        return open_special(Config(data=Data(train=str(folders[0]))), known, environment, gather)

    for answer in Ranks(2, 1).run(body):
        assert "give all hosts the same channels" in str(answer)
    assert open_special(Config(), {}, Environment(0, 2, 0, 1), lambda value: pytest.fail("not SageMaker")) is None


def test_a_damaged_shard_without_its_index_is_told(whole: Path, tmp_path: Path) -> None:
    manifest = load_manifest(str(whole))
    shard = whole / manifest.shards[2].name
    data = bytearray(shard.read_bytes())
    data[512] ^= 1  # in the first member
    shard.write_bytes(data)
    part = Manifest(str(whole), local_part(manifest, whole).shards[2:3])
    with pytest.raises(UserError, match=f"{shard.name} is damaged: its checksum"):
        with_indexes(part, [], tmp_path / "made")
