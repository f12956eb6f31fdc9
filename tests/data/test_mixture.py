"""Mixtures: exact shares in every prefix, whole passes over every source, the same sequence wherever it is joined."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.dataset import open_dataset
from dltrain.data.loader import Loader
from dltrain.data.mixture import MixedDataset, MixedOrder, Source, SourceOrder, subset
from dltrain.data.order import share
from dltrain.data.route import Route
from dltrain.data.shares import reduced
from dltrain.data.windows import Window
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError
from tests.data.in_memory import InMemory, arrays, places

weight_lists = st.lists(st.integers(1, 60), min_size=1, max_size=7).map(reduced)
shard_lists = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0).map(tuple)


def mixture(*sources: tuple[tuple[int, ...], int], **settings: int) -> MixedDataset:
    """Data sets a, b, c ... of the given shard sizes and weights; ``limit_a=5`` or ``repeat_b=2`` for one of them."""
    names = "abcdefgh"[: len(sources)]
    made = [
        Source(name, weight, settings.get(f"limit_{name}", 0), settings.get(f"repeat_{name}", 1))
        for name, (_, weight) in zip(names, sources, strict=True)
    ]
    return MixedDataset(made, [InMemory(sizes, name) for name, (sizes, _) in zip(names, sources, strict=True)])


def test_golden_vectors_never_change() -> None:
    order = MixedOrder(((4, 0, 3), (5,)), (2, 1), (1, 1), seed=1, lanes=4, window=2)
    assert places(order, range(18)) == [
        (2, 0), (0, 0), (3, 2), (0, 3), (3, 0), (2, 2), (3, 3), (0, 2), (2, 1),
        (3, 1), (0, 1), (2, 0), (0, 0), (0, 1), (3, 4), (2, 1), (3, 0), (0, 2),
    ]  # fmt: skip
    assert places(order, range(10**12, 10**12 + 6)) == [(0, 1), (2, 0), (3, 3), (2, 2), (0, 0), (0, 3)]


@given(weights=weight_lists, seed=st.integers(0, 9), position=st.integers(0, 10**13))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_counts_are_those_of_the_samples_located(weights: tuple[int, ...], seed: int, position: int) -> None:
    order = MixedOrder(((5, 3),) * len(weights), weights, seed=seed)
    shards, _ = order.locate(np.arange(position, position + 100))
    found = np.bincount(shards // 2, minlength=len(weights))
    before, after = order.counts(position), order.counts(position + 100)
    assert (np.array(after) - before).tolist() == found.tolist()
    shares = np.array(weights) * (position / sum(weights))
    assert abs(np.array(before) - shares).max() < 1 + 1e-3  # the share itself is rounded at 10^13


# ---------------------------------------------------------------------------------------------------------- passes


@given(
    shards=st.lists(shard_lists, min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    seed=st.integers(0, 9),
    lanes=st.integers(1, 20),
    window=st.integers(1, 12),
    limit=st.integers(0, 12),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_pass_over_a_source_holds_each_of_its_samples_once(
    shards: list[tuple[int, ...]], weights: list[int], seed: int, lanes: int, window: int, limit: int
) -> None:
    dataset = mixture(*zip(shards, weights, strict=False), limit_a=limit)
    order = dataset.order(seed, lanes, window)
    found = places(order, range(300))
    first = 0
    for size, sizes in zip(order.sizes, order.shard_sizes, strict=True):
        mine = [(shard - first, index) for shard, index in found if first <= shard < first + len(sizes)]
        everything = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            assert len(set(part)) == len(part)
            assert set(part) <= set(everything)
        assert len(everything) == size
        first += len(sizes)


def test_passes_and_seeds_and_sources_are_shuffled_differently() -> None:
    many = mixture(((5,) * 40, 1), ((5,) * 40, 1)).order()
    lines = [(many.walk(source, epoch).shards % 40).tolist() for source in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, lines))) == 4
    order = mixture(((50, 50), 1), ((50, 50), 1)).order()
    found = places(order, range(400))
    one = [place for place in found if place[0] < 2]
    other = [(shard - 2, index) for shard, index in found if shard >= 2]
    assert sorted(one[:100]) == sorted(one[100:]) == sorted(other[:100])
    assert len({tuple(one[:100]), tuple(one[100:]), tuple(other[:100]), tuple(other[100:])}) == 4
    assert places(mixture(((50, 50), 1), ((50, 50), 1)).order(seed=1), range(400)) != found


def test_a_limit_keeps_the_same_samples_of_whole_shards() -> None:
    sizes = (10,) * 20
    kept = subset(sizes, 35)
    assert sorted(kept) == [0] * 16 + [5, 10, 10, 10]
    assert kept[:4] != (10, 10, 10, 5)  # chosen by a key, not the first ones
    assert subset(sizes, 0) == subset(sizes, 500) == sizes
    one, other = (mixture((sizes, 1), limit_a=35).order(seed) for seed in (0, 1))
    assert set(places(one, range(35))) == set(places(other, range(70, 105)))
    assert one.samples == 35


def test_an_epoch_is_the_size_of_all_sources_and_default_shares_pass_once_over_each() -> None:
    dataset = mixture(((30,), 0), ((50, 50), 0), ((70,), 0), repeat_a=2, limit_c=40)
    order = dataset.order()
    assert order.samples == 2 * 30 + 100 + 40
    assert order.weights == (3, 5, 2)
    assert order.counts(order.samples) == [60, 100, 40]
    twice = [place for place in places(order, range(200)) if place[0] == 0]
    assert sorted(twice[:30]) == sorted(twice[30:])


# ---------------------------------------------------------------------------------------------------------- lanes


def test_a_position_reads_its_own_lane_of_whichever_source_it_takes() -> None:
    """So ranks of one node, equal modulo the nodes, read the lanes that are equal to them, of every source."""
    order = mixture(((100,) * 32, 3), ((90,) * 24, 1)).order(window=50)
    positions = np.arange(3000)  # inside the first pass over each: 2250 of 3200 samples, and 750 of 2160
    shards, indices = order.locate(positions)
    for source, shards_of in ((0, shards < 32), (1, shards >= 32)):
        walk = order.walk(source, 0)
        begin = dict(zip(walk.shards.tolist(), walk.starts.tolist(), strict=True))
        line = np.array([begin[shard] for shard in shards[shards_of].tolist()]) + indices[shards_of]
        lane = np.searchsorted(walk.lane_starts, line, side="right") - 1
        assert lane.tolist() == (positions[shards_of] % 16).tolist()


def test_lanes_of_a_source_take_equal_parts_but_for_chance() -> None:
    order = mixture(((1000,) * 64, 1), ((1000,) * 64, 1)).order()
    sizes = order.walk(0, 0).lane_sizes
    assert sizes.sum() == 64_000
    assert abs(sizes / 4000 - 1).max() < 0.15


@pytest.mark.parametrize("node", [0, 1, 2])
def test_the_route_of_a_source_holds_the_shards_its_node_reads(node: int) -> None:
    """Three nodes of one rank and 12 lanes; sizes that divide by nothing, so that lanes shift with every epoch."""
    dataset = mixture(((7, 11, 13) * 9, 2), ((17,) * 20, 1))
    order = dataset.order(lanes=12, window=8)
    for source, first in ((0, 0), (1, 27)):
        part, size = SourceOrder(order, source), order.sizes[source]
        route = Route(part, np.ones(len(order.shard_sizes[source]), dtype=np.int64), node, 3)
        mine = share(0, 3 * order.samples, node, 3)
        counts = np.array([order.counts(int(position))[source] for position in mine])
        shards, _ = order.locate(mine)
        here = (shards >= first) & (shards < first + len(order.shard_sizes[source]))
        for epoch in range(2):
            read = set((shards[here & (counts // size == epoch)] - first).tolist())
            assert read == set(route.stops(epoch).shard.tolist())


# ---------------------------------------------------------------------------------------------------------- data set


def test_samples_come_back_in_the_order_asked_for() -> None:
    dataset = mixture(((3, 2), 1), ((4,), 1))
    shards, indices = np.array([2, 0, 1, 2, 0]), np.array([3, 2, 1, 0, 0])
    assert [sample.key for sample in dataset.read(shards, indices)] == ["b/0/3", "a/0/2", "a/1/1", "b/0/0", "a/0/0"]
    assert dataset.shard_sizes == (3, 2, 4)


def test_facts_are_the_first_source_s_and_each_source_s_own() -> None:
    sets = [InMemory((3,), "a", {"classes": ["x", "y"]}), InMemory((3,), "b", {"season": 7})]
    facts = MixedDataset([Source("a"), Source("b")], sets).facts
    assert facts["classes"] == ["x", "y"]
    assert facts["sources"] == {"a": {"classes": ["x", "y"]}, "b": {"season": 7}}


def test_the_fingerprint_names_the_source_that_changed() -> None:
    before = mixture(((3, 2), 1), ((4,), 1)).fingerprint.split("+")
    assert mixture(((3, 2), 5), ((4,), 2)).fingerprint.split("+") == before
    changed = [mixture(((3, 2), 1), ((5,), 1)), mixture(((3, 2), 1), ((4,), 1), limit_b=2)]
    for dataset in changed:
        first, second = dataset.fingerprint.split("+")
        assert first == before[0]
        assert second != before[1]


def test_sources_that_fetch_ahead_are_told_their_own_way() -> None:
    class Fetching(InMemory):
        def follow(self, order: SourceOrder, node: int, nodes: int) -> None:
            self.facts.update(way=order, node=(node, nodes))

        def advance(self, position: int) -> None:
            self.facts["position"] = position

        def rest(self) -> None:
            self.facts["resting"] = True

    sets = [InMemory((30,), "a"), Fetching((40, 20), "b")]
    dataset = MixedDataset([Source("a", 1), Source("b", 2)], sets)
    dataset.advance(5)  # nobody follows yet
    assert "position" not in sets[1].facts
    order = dataset.order()
    dataset.follow(order, 1, 2)
    dataset.advance(300)
    assert sets[1].facts["position"] == 200
    assert sets[1].facts["node"] == (1, 2)
    assert sets[1].facts["way"].samples == 60
    dataset.rest()
    assert sets[1].facts["resting"]
    assert set(sets[1].facts["way"].walk(3).shards.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Source("a", weight=-1), "the weight of source a is -1; give a whole number, 0 or more"),
        (lambda: Source("a", weight=0.5), "the weight of source a is 0.5"),  # type: ignore[arg-type]
        (lambda: Source("a", repeat=0), "the repeat of source a is 0; give a whole number, 1 or more"),
        (lambda: MixedDataset([], []), "a mixture has no sources"),
        (lambda: MixedDataset([Source("a")] * 2, [InMemory((3,))] * 2), "data.sources names a more than once"),
        (lambda: mixture(((0, 0), 1), ((3,), 1)), "source a has no samples"),
        (lambda: mixture(((3,), 1), ((3,), 0)).order(), "weights of data.sources are 1:0; give every source"),
        (
            lambda: mixture(((3,), 1_281_167), ((3,), 30_007)).order(),
            "repeat only after 1311174 samples, and 65536 are the most; round them, for example to 16009:375",
        ),
        (lambda: mixture(((3,), 65_535), ((3,), 1)).order(lanes=65_521), "set data.lanes to 16, or round the weights"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------------------------------------------------- loader


def loader(dataset: MixedDataset, **settings) -> Loader:
    order = dataset.order(settings.pop("seed", 5), lanes=4, window=3)
    return Loader(dataset, order, arrays, **{"global_batch_size": 8, "augment": True, **settings})


def take(source: Loader, steps: int) -> list:
    return [batch for _, batch in zip(range(steps), source, strict=False)]


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_a_mixture_has_no_tail_to_drop_or_pad(tail: str) -> None:
    with pytest.raises(UserError, match=f"data.tail is '{tail}', .*; set data.tail carry"):
        loader(mixture(((9,), 1), ((9,), 1)), tail=tail)


def test_workers_change_nothing_and_the_cursor_resumes() -> None:
    dataset = mixture(((5, 9, 3), 2), ((8, 8), 1))
    alone, helped = loader(dataset), loader(dataset, workers=2, start_method="fork")
    for one, other in zip(take(alone, 6), take(helped, 6), strict=True):
        assert one.keys == other.keys
        assert one.fields["random"].tolist() == other.fields["random"].tolist()
    assert not multiprocessing.active_children()
    state = json.loads(json.dumps(alone.state_dict()))
    assert len(json.dumps(state)) < 220
    resumed = loader(dataset, rank=1, ranks=2)
    resumed.load_state_dict(state)
    following = take(alone, 1)[0]
    assert set(take(resumed, 1)[0].keys) == set(following.keys[1::2])


def test_a_changed_mixture_is_refused() -> None:
    state = loader(mixture(((5, 9), 2), ((8,), 1))).state_dict()
    loader(mixture(((5, 9), 4), ((8,), 2))).load_state_dict(state)  # the same shares
    with pytest.raises(UserError, match=r"data\.sources\.weight is \[1, 1\], the checkpoint's was \[2, 1\]"):
        loader(mixture(((5, 9), 1), ((8,), 1))).load_state_dict(state)
    with pytest.raises(UserError, match="data set has changed since the checkpoint"):
        loader(mixture(((5, 9), 2), ((9,), 1))).load_state_dict(state)
    with pytest.raises(UserError, match=r"run\.seed is 6"):
        loader(mixture(((5, 9), 2), ((8,), 1)), seed=6).load_state_dict(state)


def test_an_order_is_pickled_without_what_it_worked_out() -> None:
    order = mixture(((50,) * 100, 1), ((50,) * 100, 1)).order()
    fresh = len(pickle.dumps(order))
    before = places(order, range(100))
    assert len(pickle.dumps(order)) == fresh < 2000
    assert places(pickle.loads(pickle.dumps(order)), range(100)) == before


def test_a_weight_returned_by_the_transform_becomes_the_sample_s() -> None:
    sets = [InMemory((3, 3), "a", extra={"weight": 0.25}), InMemory((5,), "b")]
    dataset = MixedDataset([Source("a", 1), Source("b", 1)], sets)
    batch = next(iter(loader(dataset, rank=0, ranks=3)))  # 3 of 8 samples
    assert "weight" not in batch.fields
    expected = [0.25 if key.startswith("a") else 1.0 for key in batch.keys]
    assert batch.weight.tolist() == expected
    padded = next(iter(loader(dataset, rank=2, ranks=3)))  # 2 samples and one of padding
    assert padded.weight[2] == 0
    assert padded.weight.dtype == torch.float32


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e300, [1.0, 2.0], "much"])
def test_a_weight_that_cannot_be_used_names_its_sample(weight: object) -> None:
    dataset = MixedDataset([Source("a")], [InMemory((9,), "a", extra={"weight": weight})])
    with pytest.raises(UserError, match=r"the weight of a\S* is .*; return one finite number, 0 or more"):
        next(iter(loader(dataset)))


def test_windows_of_time_series_are_mixed_like_samples(tmp_path: Path) -> None:
    import io

    lengths = {"load": (20, 3, 14), "wind": (31,)}
    for name, steps in lengths.items():
        with ShardWriter(str(tmp_path / name), samples_per_shard=1) as writer:
            for place, length in enumerate(steps):
                buffer = io.BytesIO()
                np.save(buffer, np.arange(length, dtype=np.float32))
                writer.write(f"{name}{place}", {"npy": buffer.getvalue()})
    window = Window(lookback=4, horizon=2)
    sources = [Source(str(tmp_path / "load"), 1), Source(str(tmp_path / "wind"), 2)]
    dataset = MixedDataset(sources, [open_dataset(source.url, window=window) for source in sources])
    assert dataset.shard_sizes == (15, 0, 9, 26)  # length - 6 + 1 windows of each series, one series a shard
    order = dataset.order(lanes=4, window=5)
    samples = dataset.read(*order.locate(np.arange(72)))
    keys = [sample.key for sample in samples]
    assert [key.startswith("load") for key in keys].count(True) == 24  # a third: one pass over 15 + 9 windows
    assert len({key for key in keys if key.startswith("load")}) == 24
    for sample in samples:
        begin = int(sample.key.partition("@")[2])
        assert sample.fields["values"][:, 0].tolist() == list(range(begin, begin + 6))
