"""The plan of a training: against the order walked sample by sample, the cache's rules, and a real run's downloads."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain import storage
from dltrain.cli import shards_plan
from dltrain.cli.main import Parser
from dltrain.data.building.progress import size_text
from dltrain.data.cache import NodeCache
from dltrain.data.cached import CachedFiles
from dltrain.data.dataset import Cache, open_dataset
from dltrain.data.loader import Loader
from dltrain.data.manifest import NAME, Manifest, ShardInfo, load_manifest
from dltrain.data.order import Order
from dltrain.data.planning import EXPECTED_RATE, Training, make_plan, requests_of
from dltrain.data.prefetch import Depth
from dltrain.data.route import Route
from dltrain.data.sample import Sample
from dltrain.data.timeline import Timeline
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from dltrain.storage import counters, ranges
from dltrain.testing.s3 import S3Server

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=16).filter(lambda sizes: sum(sizes) > 0)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def manifest_of(sizes: list[int], shard_bytes: list[int] | None = None, index_bytes: int = 7) -> Manifest:
    table = zip(sizes, shard_bytes or [100] * len(sizes), strict=True)
    return Manifest(
        "s3://bucket/data",
        tuple(
            ShardInfo(f"{place}.tar", samples, size, place, f"{place}.tar.idx", index_bytes, place)
            for place, (samples, size) in enumerate(table)
        ),
    )


def touched(order: Order, epoch: int, nodes: int, node: int) -> list[set[int]]:
    """The shards in each window of the lanes that a node reads, by asking for every position."""
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    step = int(np.gcd(nodes, order.lanes))
    shards, _ = order.locate(positions)
    window = (positions - epoch * order.samples) // order.lanes // order.window
    found = [set[int]() for _ in range(int(window.max()) + 1)]
    for place, shard, number in zip(positions.tolist(), shards.tolist(), window.tolist(), strict=True):
        if place % step == node % step:
            found[number].add(shard)
    return found


@FEW
@given(SIZES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_downloads_are_the_shards_that_a_walk_over_all_samples_touches(
    sizes: list[int], lanes: int, window: int, nodes: int, epochs: int, ranks: int
) -> None:
    size = [50 + 10 * place for place in range(len(sizes))]
    training = Training(
        nodes, ranks, nodes * ranks, epochs, lanes=lanes, window=window, part_bytes=40
    )  # bytes of a part
    plan = make_plan(manifest_of(sizes, size), training, manifest_bytes=33)
    order = Order(tuple(sizes), 0, lanes, window)
    seen, gets, per_node = [0] * epochs, 0, []
    for node in range(nodes):
        kept = set[int]()
        for epoch in range(epochs):
            fresh = set.union(*touched(order, epoch, nodes, node)) - kept
            seen[epoch] += sum(size[shard] + 7 for shard in fresh)
            gets += sum(-(-size[shard] // 40) + 1 for shard in fresh)
            kept |= fresh
        per_node.append(sum(size[shard] + 7 for shard in kept))
    whole = sum(size) + 7 * len(size)
    assert plan.times_dataset_by_epoch == pytest.approx([one / whole for one in seen])
    assert plan.downloaded_bytes == sum(seen) + 33 * nodes * ranks
    assert plan.downloaded_bytes_per_node == max(per_node) + 33 * ranks
    assert plan.get_requests == gets + nodes * ranks
    assert plan.cache_all_bytes == max(per_node)
    assert plan.cost == pytest.approx(plan.get_requests * 0.0004 / 1000)
    assert plan.steps_per_epoch == -(-sum(sizes) // (nodes * ranks))
    assert plan.steps == -(-epochs * sum(sizes) // (nodes * ranks))


def simulated(route: Route, epochs: int, budget: int, ahead: int) -> list[tuple[int, int]]:
    """Window of use and shard of every download, by the rules of the cache and its prefetcher told word by word."""
    idle, clock, loads, begin, size = dict[int, int](), 0, list[tuple[int, int]](), 0, route.shard_bytes
    for epoch in range(epochs):
        for window in range(route.stops(epoch).windows):
            position = epoch * route.order.samples + window * route.order.lanes * route.order.window
            until = route.next_use(position)
            for shard in idle:
                fresh = np.isinf(until[shard]) and not idle[shard]
                clock += fresh
                idle[shard] = clock if fresh else idle[shard] if np.isinf(until[shard]) else 0
            found = 0
            seen = set[int]()
            for shard, ahead_by in route.ahead(position):
                if (ahead_by > 1 and found >= ahead) or len(seen) == len(size):
                    break
                seen.add(shard)
                found += int(size[shard])
                if shard in idle:
                    continue
                room = budget - sum(int(size[kept]) for kept in idle)
                for victim in sorted(idle, key=lambda s: (-until[s], idle[s] or s)):
                    if room < size[shard] and (not ahead_by or until[victim] > max(1, until[shard])):
                        room += int(size[victim])
                        del idle[victim]
                if room < size[shard]:
                    break
                idle[shard] = 0
                loads.append((begin + window + ahead_by, shard))
        begin += route.stops(epoch).windows
    return sorted(load for load in loads if load[0] < begin)


@FEW
@given(
    SIZES,
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 3),
    st.floats(0, 1),
    st.floats(0, 0.3),
    st.integers(0, 3),
)
def test_a_small_cache_loads_what_its_own_rules_say(
    sizes: list[int], lanes: int, window: int, nodes: int, room: float, depth: float, seed: int
) -> None:
    order, size = Order(tuple(sizes), seed, lanes, window), np.arange(len(sizes)) * 10 + 50
    for node, line in enumerate(Timeline.of(order, len(sizes), nodes, 3)):
        route = Route(order, size, node, nodes)
        least = max(route.needed(epoch) for epoch in range(3)) + int(size.max())
        budget = int(least + room * max(0, int(size.sum()) - least))
        loaded = line.loads(size, budget, int(depth * budget))
        mine = sorted(zip(line.first[loaded].tolist(), line.shard[loaded].tolist(), strict=True))
        assert mine == simulated(route, 3, budget, int(depth * budget))


@FEW
@given(SIZES, st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 3))
def test_the_cache_that_loads_nothing_twice_in_an_epoch_is_the_smallest(
    sizes: list[int], lanes: int, window: int, nodes: int, seed: int
) -> None:
    order, size = Order(tuple(sizes), seed, lanes, window), np.arange(len(sizes)) * 10 + 50

    def twice(line: Timeline, budget: int) -> bool:
        loaded = line.loads(size, budget, 0)
        pairs = list(zip(line.epoch[loaded].tolist(), line.shard[loaded].tolist(), strict=True))
        return len(set(pairs)) < len(pairs)

    for node, line in enumerate(Timeline.of(order, len(sizes), nodes, 2)):
        enough = max(line.peak(size, epoch) for epoch in (0, 1))
        route = Route(order, size, node, nodes)
        refused = max(route.needed(0), route.needed(1)) + int(size.max())
        assert not twice(line, max(enough, refused))
        if enough - 1 >= refused:
            assert twice(line, enough - 1)


@FEW
@given(SIZES, st.integers(1, 5), st.integers(1, 9))
def test_shards_mixed_are_those_that_share_a_window(sizes: list[int], lanes: int, window: int) -> None:
    plan = make_plan(manifest_of(sizes), Training(lanes=lanes, window=window))
    order = Order(tuple(sizes), 0, lanes, window)
    mixed = [len(shards) for shards in touched(order, 0, 1, 0)]
    lane_windows = [len(shards) for lane in range(lanes) for shards in touched(order, 0, lanes, lane) if shards]
    assert (plan.shards_mixed_max, plan.shards_mixed_mean) == (max(mixed), pytest.approx(np.mean(mixed)))
    assert plan.shards_per_window_max == max(lane_windows)
    assert plan.shards_per_window_mean == pytest.approx(np.mean(lane_windows))


@pytest.mark.parametrize(("samples", "lanes", "window"), [(4000, 2, 100), (4000, 4, 150), (1000, 3, 5000)])
def test_neighbours_end_up_as_far_apart_as_told(samples: int, lanes: int, window: int) -> None:
    # one shard, so that its line is its samples; pairs that two lanes divide are not neighbours of a lane
    plan = make_plan(manifest_of([samples]), Training(lanes=lanes, window=window))
    found: list[int] = []
    for seed in range(20):
        place = np.empty(samples, dtype=np.int64)
        place[Order((samples,), seed, lanes, window).locate(np.arange(samples))[1]] = np.arange(samples)
        inside = place[1:] % lanes == place[:-1] % lanes
        found += np.abs(np.diff(place))[inside].tolist()
    assert plan.neighbour_distance_mean == pytest.approx(np.mean(found), rel=0.02)
    assert 0.8 * plan.neighbour_distance_max <= max(found) <= plan.neighbour_distance_max
    assert plan.neighbour_distance_of_full_shuffle == pytest.approx(np.mean(found) / (samples / 3), rel=0.02)


def test_sixteen_nodes_download_the_data_set_once_together_and_sixteen_times_from_one_lane() -> None:
    data = manifest_of([1000] * 1024, [100 << 20] * 1024)
    training = Training(nodes=16, ranks_per_node=8, global_batch_size=1024)
    assert 1.0 <= make_plan(data, training).times_dataset < 1.02  # the lanes' ends cut 15 shards
    assert make_plan(data, replace(training, lanes=1)).times_dataset == pytest.approx(16)


def test_large_reads_go_out_in_as_many_parts_as_were_counted() -> None:
    sizes = np.concatenate((np.arange(1, 2000) * 321_987, np.array([1, 4 << 20, (4 << 20) + 1, 64 << 20, 1 << 30])))
    parts = [-(-size // ranges._part_bytes(size)) for size in sizes.tolist()]
    assert requests_of(sizes, Training()).tolist() == parts


@pytest.mark.parametrize("cache", [0, 60, 200])
def test_ten_thousand_shards_are_planned_within_a_second(cache: int) -> None:
    random = np.random.default_rng(0)
    data = manifest_of(
        random.integers(900, 1100, 10_000).tolist(), random.integers(90 << 20, 110 << 20, 10_000).tolist()
    )
    training = Training(nodes=16, ranks_per_node=8, global_batch_size=4096, epochs=10, cache_bytes=cache << 30)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        plan = make_plan(data, training)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1.0
    assert plan.times_dataset_by_epoch[0] == pytest.approx(1.0, abs=0.01)


def number(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
    return {"size": np.array(len(sample.fields["bin"]))}


@pytest.fixture(scope="module")
def url(s3: S3Server) -> str:
    random = np.random.default_rng(0)
    with ShardWriter("s3://data/planned", samples_per_shard=20) as writer:
        for place in range(300):
            writer.write(f"k{place:04d}", {"bin": random.bytes(4000 + place)})
    return "s3://data/planned"


def test_two_nodes_download_what_was_planned(url: str, tmp_path: Path) -> None:
    training = Training(2, 2, 20, epochs=5, lanes=4, window=15)
    plan = make_plan(load_manifest(url), training, storage.size(storage.join(url, NAME)))
    assert plan.times_dataset_by_epoch[-1] == 0  # by then both have all, and what is fetched ahead is nothing new
    before = counters.snapshot()
    for rank in range(4):  # ranks of a node share its cache
        dataset = open_dataset(url, cache=Cache(str(tmp_path / str(rank % 2)), depth=Depth(0, 0.0)))
        order = Order(dataset.shard_sizes, 0, 4, 15)
        place = {"rank": rank, "ranks": 4, "node": rank % 2, "nodes": 2}
        loader = Loader(dataset, order, number, global_batch_size=20, **place)
        for _, batch in zip(range(plan.steps), loader, strict=False):
            assert len(batch) == 5
        loader._fetch.dataset.reader.files.rest()
    seen = counters.snapshot() - before
    assert seen.bytes == plan.downloaded_bytes
    # an answer that is late on a busy machine is asked for again, and one may be cancelled before its first byte
    assert 0 <= seen.requests - seen.retries - plan.get_requests <= 1


def wait_for_windows(files: CachedFiles, position: int) -> None:
    """A network that keeps up: this window's shards are there, and the next one's as far as there is room."""
    assert files._route is not None
    soon = list(takewhile(lambda ahead: ahead[1] <= 1, files._route.ahead(position)))
    for patience, within in ((10.0, 0), (0.3, 1)):
        last = time.monotonic() + patience
        while not all(files._holds(shard) for shard, until in soon if until <= within) and time.monotonic() < last:
            time.sleep(0.005)


@pytest.mark.parametrize("part", [0.5, 0.8])
def test_a_small_cache_downloads_again_what_was_planned(url: str, tmp_path: Path, part: float) -> None:
    manifest = load_manifest(url)
    budget = int(part * sum(shard.bytes + shard.index_bytes for shard in manifest.shards))
    training = Training(epochs=3, lanes=2, window=10, cache_bytes=budget, ahead_bytes=0, global_batch_size=20)
    plan = make_plan(manifest, training, storage.size(storage.join(url, NAME)))
    assert 0 < plan.times_dataset_by_epoch[2] < 1
    before = counters.snapshot()
    dataset = open_dataset(url, cache=Cache(str(tmp_path), budget, Depth(0, 0.0)))
    order = Order(dataset.shard_sizes, 0, 2, 10)
    dataset.follow(order, 0, 1)
    for start in range(0, 3 * 300, 20):
        dataset.advance(start)
        wait_for_windows(dataset.reader.files, start)
        assert len(dataset.read(*order.locate(np.arange(start, start + 20)))) == 20
    dataset.reader.files.rest()
    seen = counters.snapshot() - before
    # a shard is five hundred times its index, and the cache lets either go by itself
    assert seen.bytes == pytest.approx(plan.downloaded_bytes, rel=0.02)
    assert seen.requests == pytest.approx(plan.get_requests, abs=6)


def test_a_cache_is_refused_where_the_training_would_be(url: str, tmp_path: Path) -> None:
    manifest = load_manifest(url)
    training = Training(lanes=2, window=10, global_batch_size=20)
    required = make_plan(manifest, training).cache_required_bytes
    route = Route(
        Order(tuple(s.samples for s in manifest.shards), 0, 2, 10), np.array([s.bytes for s in manifest.shards])
    )
    CachedFiles(manifest, NodeCache(tmp_path, required), Depth()).follow(route)
    with pytest.raises(UserError, match="may hold"):
        CachedFiles(manifest, NodeCache(tmp_path / "small", required - 1), Depth()).follow(route)
    make_plan(manifest, replace(training, cache_bytes=required))
    with pytest.raises(UserError, match=r"a cache of 0\.00\d GiB would be refused: two windows .* need 0\.00\d GiB"):
        make_plan(manifest, replace(training, cache_bytes=required - 1))


def test_the_start_is_read_by_ranges_where_whole_shards_would_take_long(tmp_path: Path) -> None:
    files = CachedFiles(manifest_of([1]), NodeCache(tmp_path, 1000), Depth())
    assert files._bandwidth == EXPECTED_RATE
    data = manifest_of([1000] * 64, [100 << 20] * 64, 60_000)
    training = Training(global_batch_size=64, window=100, megabits=8000.0)  # 1e9 bytes per second
    plan = make_plan(data, training)
    # 16 lanes begin in 16 shards: three answers, 16 indexes, and 64 of 64,000 samples at half the bandwidth
    assert plan.first_batch_seconds == pytest.approx(0.09 + (16 * 60_000 + 2 * 64 * (100 << 20) / 1000) / 1e9, rel=0.2)
    assert plan.first_window_seconds > plan.first_batch_seconds
    small = make_plan(manifest_of([1000] * 64, [1 << 20] * 64, 60_000), training)
    assert small.first_batch_seconds == pytest.approx(0.09 + 16 * ((1 << 20) + 60_000) / 1e9, rel=0.2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nodes": 0}, "nodes is 0; give more than 0"),
        ({"price_get": -1.0}, "price_get is -1.0; give 0 or more"),
        ({"nodes": 4, "ranks_per_node": 32}, "global batch size is 64, smaller than the 128 ranks"),
    ],
)
def test_what_a_training_would_be_refused_for_is_refused(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_plan(manifest_of([1000] * 8), replace(Training(), **change))


def test_the_command_ends_with_one_json_object(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = (parser := Parser(prog="dltrain shards")).add_subparsers(dest="command", required=True)
    shards_plan.add_parser(commands)
    words = ["plan", url, "--nodes", "3", "--epochs", "2", "--window", "15", "--lanes", "4", "--price-transfer", "0.02"]
    shards_plan.run(parser.parse_args(words))
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    training = Training(nodes=3, epochs=2, window=15, lanes=4, price_transfer=0.02)
    plan = make_plan(load_manifest(url), training, storage.size(storage.join(url, NAME)))
    assert result == {"url": url, "shards": 15, **plan.as_json()}
    assert any("3 hosts read each lane" in line and "make lanes 3 or a multiple" in line for line in lines)
    assert (
        f"  all hosts                      {size_text(plan.downloaded_bytes)}, {plan.times_dataset:.2f} x the data set"
        in lines
    )
    assert 3.0 < plan.times_dataset < 3.01  # the manifest is read by every rank
