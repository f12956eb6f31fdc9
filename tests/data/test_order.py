"""The order of data: a bijection, the same for ever, and the same whatever the world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.order import Order, derive, mix, permute, sample_key, share, step_key, step_span, steps_between
from dltrain.data.stream import Places

shard_lists = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


def keys(order: Order, positions: np.ndarray) -> list[tuple[int, int]]:
    shards, indices = order.locate(positions)
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


def test_golden_vectors_never_change() -> None:
    # SplitMix64 of seed 0 begins with e220a8397b1dcdaf (Vigna's reference implementation): its first state is one
    # golden step, so mix(golden) must be that number
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert [derive(0), derive(1, 2, 3)] == [16294208416658607535, 16914669369030367833]
    assert [sample_key(0, 5), step_key(7, 3, 1)] == [17913677030708920692, 17139139614371300993]
    size, key = np.full(10, 10), np.full(10, 42, dtype=np.uint64)
    assert permute(np.arange(10), size, key).tolist() == [1, 9, 4, 2, 6, 3, 0, 5, 7, 8]
    order = Order((5, 3, 8), seed=1, lanes=4, window=2)
    assert keys(order, np.arange(16)) == [
        (2, 1), (2, 4), (1, 0), (0, 1), (2, 0), (2, 5), (1, 1), (0, 2),
        (2, 2), (2, 7), (0, 0), (0, 3), (2, 3), (2, 6), (1, 2), (0, 4),
    ]  # fmt: skip


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    result = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(result.tolist()) == list(range(size))


@given(
    sizes=shard_lists,
    seed=st.integers(0, 9),
    lanes=st.integers(1, 20),
    window=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_every_sample_once(sizes: list[int], seed: int, lanes: int, window: int, epoch: int) -> None:
    order = Order(tuple(sizes), seed, lanes, window)
    positions = np.arange(order.samples) + epoch * order.samples
    everything = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    assert sorted(keys(order, positions)) == everything


@given(
    sizes=shard_lists,
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    worlds=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
@settings(max_examples=80, deadline=None)
def test_any_world_and_any_batch_size_continue_one_sequence(
    sizes: list[int], batches: list[int], worlds: list[int]
) -> None:
    """A run that changes its ranks and its batch size at every step sees positions 0, 1, 2, ... all the same."""
    order = Order(tuple(sizes), seed=3)
    position, seen = 0, []
    for step in range(6):
        ranks = worlds[step % len(worlds)]
        start, position = step_span(position, order.samples, batches[step % len(batches)], "carry")
        shares = [share(start, position, rank, ranks) for rank in range(ranks)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        seen += sorted(place for part in shares for place in part.tolist())
    assert seen == list(range(position))


@pytest.mark.parametrize(
    ("tail", "spans"),
    [
        ("carry", [(0, 4), (4, 8), (8, 12), (12, 16)]),
        ("drop", [(0, 4), (4, 8), (10, 14), (14, 18)]),
        ("pad", [(0, 4), (4, 8), (8, 10), (10, 14)]),
    ],
)
def test_the_tail_of_ten_samples_in_steps_of_four(tail: str, spans: list[tuple[int, int]]) -> None:
    position, found = 0, []
    for _ in spans:
        start, position = step_span(position, 10, 4, tail)
        found.append((start, position))
    assert found == spans


def test_epochs_and_seeds_differ_and_memory_does_not_grow_with_samples() -> None:
    order = Order((50, 50), seed=0)
    first, second = keys(order, np.arange(100)), keys(order, np.arange(100, 200))
    assert first != second
    assert keys(Order((50, 50), seed=1), np.arange(100)) != first
    huge = Order((10**9,) * 10, seed=0)  # ten thousand million samples: an array of them would not fit
    shards, indices = huge.locate(np.arange(256) + 7 * 10**9)
    assert len(set(zip(shards.tolist(), indices.tolist(), strict=True))) == 256


def test_without_shuffle_lanes_read_in_the_order_of_the_manifest() -> None:
    order = Order((4, 4), lanes=2, shuffle=False)
    assert keys(order, np.arange(8)) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]


def test_a_node_reads_its_own_lanes_alone() -> None:
    """16 lanes on 4 nodes of 2 ranks: data ranks count across nodes first, so node n holds ranks n and n + 4."""
    order = Order((100,) * 32, lanes=16, window=10_000, shuffle=False)
    lane_samples = order.samples // 16
    for node in range(4):
        lanes = set()
        for rank in (node, node + 4):
            shards, indices = order.locate(share(0, order.samples, rank, 8))
            lanes |= set(((shards * 100 + indices) // lane_samples).tolist())
        assert lanes == {node, node + 4, node + 8, node + 12}


@given(
    samples=st.integers(1, 40),
    batch=st.integers(1, 20),
    tail=st.sampled_from(["carry", "drop", "pad"]),
    done=st.integers(0, 12),
    end=st.integers(0, 150),
)
@settings(max_examples=300, deadline=None)
def test_steps_that_are_left_are_those_a_walk_would_take(
    samples: int, batch: int, tail: str, done: int, end: int
) -> None:
    if tail == "drop" and batch > samples:
        return  # refused by the loader: no step would ever be whole
    position = 0
    for _ in range(done):
        _, position = step_span(position, samples, batch, tail)
    walked, place = 0, position
    while place < end:
        start, place = step_span(place, samples, batch, tail)
        walked += start < end  # a dropped tail that reaches the end is no step
    assert steps_between(position, end, samples, batch, tail) == walked


@pytest.mark.parametrize("ranks", [1, 3])
def test_places_worked_out_ahead_are_those_of_the_order(ranks: int) -> None:
    order = Order((1000, 700, 437), seed=3, lanes=4, window=50)
    places = Places(order)
    for start in [*range(0, 15_000, 96), 40, 99_990, 0]:  # in turn, over epochs, and by jumps
        wanted = share(start, start + 96, 1 % ranks, ranks)
        padded = np.append(wanted, wanted[0])
        for found, expected in zip(places.locate(padded), order.locate(padded), strict=True):
            np.testing.assert_array_equal(found, expected)
    one = np.array([17])
    assert [part.tolist() for part in places.locate(one)] == [part.tolist() for part in order.locate(one)]
