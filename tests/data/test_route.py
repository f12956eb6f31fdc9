"""The route of a node, against the order itself walked sample by sample."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.mixture import MixedOrder, SourceOrder
from dltrain.data.order import Order
from dltrain.data.route import Route

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def windows(order: Order, epoch: int, node: int, nodes: int) -> list[set[int]]:
    """The shards that each window of an epoch touches on a node, by asking for every position."""
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    shards, _ = order.locate(positions)
    number = (positions - epoch * order.samples) // order.lanes // order.window
    found = [set[int]() for _ in range(int(number.max()) + 1)]
    for position, window, shard in zip(positions.tolist(), number.tolist(), shards.tolist(), strict=True):
        if position % nodes == node:
            found[window].add(shard)
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SIZES, st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_a_route_agrees_with_its_order(
    sizes: list[int], lanes: int, window: int, nodes: int, node: int, shuffle: bool
) -> None:
    order = Order(tuple(sizes), seed=3, lanes=lanes, window=window, shuffle=shuffle)
    node %= nodes
    size = np.arange(1, len(sizes) + 1) * 100
    route = Route(order, size, node, nodes)
    for epoch in (0, 1):
        walked = windows(order, epoch, node, nodes)
        stops = route.stops(epoch)
        touched = [set(stops.shard[(stops.first <= w) & (w <= stops.last)].tolist()) for w in range(len(walked))]
        for mine, theirs in zip(touched, walked, strict=True):
            assert mine >= theirs
            assert mine == theirs or nodes > 1  # of a lane that several nodes share, each reads a part
        pairs = [walked[w] | (walked[w + 1] if w + 1 < len(walked) else set()) for w in range(len(walked))]
        assert route.needed(epoch) >= max(int(size[list(pair)].sum()) for pair in pairs)
        assert route.needed(epoch) <= size.sum()


def test_next_use_is_the_first_window_from_here_that_touches_a_shard() -> None:
    order = Order((40, 40, 40, 40), seed=0, lanes=2, window=10)
    route = Route(order, np.full(4, 1000))
    this, following = windows(order, 0, 0, 1), windows(order, 1, 0, 1)
    ahead = this[3:] + following
    expected = [next(w for w, shards in enumerate(ahead) if shard in shards) for shard in range(4)]
    assert route.next_use(3 * 20).tolist() == expected


def test_the_way_ahead_names_each_shard_once_in_an_epoch_by_first_use() -> None:
    order = Order((40, 40, 40, 40), seed=0, lanes=2, window=10)
    found = list(islice(Route(order, np.full(4, 1000)).ahead(0), 8))
    assert sorted(shard for shard, _ in found[:4]) == sorted(shard for shard, _ in found[4:]) == [0, 1, 2, 3]
    assert [until for _, until in found] == sorted(until for _, until in found)
    assert found[4][1] == 8  # 160 samples in two lanes of windows of ten


@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_read_their_own_lanes_alone(nodes: int) -> None:
    order = Order((100,) * 64, seed=1, lanes=16, window=50)
    routes = [set(Route(order, np.full(64, 1), node, nodes).stops(0).shard.tolist()) for node in range(nodes)]
    shared = sum(len(one) for one in routes) - 64
    assert shared <= 16  # only the shards that two lanes divide between them
    assert set.union(*routes) == set(range(64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_a_route_through_a_mixture_holds_every_shard_in_the_windows_that_read_it(
    one: int, other: int, seed: int, nodes: int
) -> None:
    """Lanes of a source are uneven: of 12 lanes the longest has some percent more than the shortest."""
    sizes = ((60,) * 40, (35,) * 50)
    order = MixedOrder(sizes, (one, other), seed=seed, lanes=12, window=20)
    for source in (0, 1):
        part, first = SourceOrder(order, source), order.first_shard(source)
        positions = np.arange(2 * order.samples)
        shards, _ = order.locate(positions)
        mine = (shards >= first) & (shards < first + len(sizes[source]))
        number = np.cumsum(mine) - 1  # of the source's own samples
        for node in range(nodes):
            route = Route(part, np.ones(len(sizes[source]), dtype=np.int64), node, nodes)
            here = np.flatnonzero(mine & (positions % nodes == node))
            for position in here.tolist():
                epoch, window = route.window(int(number[position]))
                stops, shard = route.stops(epoch), shards[position] - first
                assert ((stops.shard == shard) & (stops.first <= window) & (window <= stops.last)).any()
