"""The order of data as a whole: whatever the shards, world, workers, batch sizes, mixture and stops, one sequence.

Every claim is made of a loader per rank, over samples that say where they stand. Worker processes are stood in for by
copies of what they are sent, taking turns by batch as torch's loader lets them; one test starts real ones.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dltrain.data.batch import Batch
from dltrain.data.loader import Loader
from dltrain.data.mixture import MixedDataset, Source
from dltrain.data.order import Order, SampleOrder, permute, share, step_span
from dltrain.data.reader import Dataset
from tests.data.in_memory import InMemory, Place, arrays, places

properties = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# empty shards and shards of one sample among them
shard_lists = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 12, 20]), min_size=1, max_size=8).filter(any).map(tuple)


@dataclass(frozen=True)
class Case:
    """A data set, how it is ordered, and what becomes of an epoch's last batch."""

    dataset: Dataset
    order: SampleOrder
    tail: str

    def loader(self, batch: int, rank: int, ranks: int, **more: int) -> Loader:
        size = {"global_batch_size": batch, "rank": rank, "ranks": ranks}
        return Loader(self.dataset, self.order, arrays, tail=self.tail, augment=True, **size, **more)

    def spans(self, position: int, batch: int) -> Iterator[tuple[int, int]]:
        while True:
            start, position = step_span(position, self.order.samples, batch, self.tail)
            yield start, position

    def keys(self, start: int, stop: int) -> dict[int, str]:
        """Of every position."""
        samples = self.dataset.read(*self.order.locate(np.arange(start, stop)))
        return {position: sample.key for position, sample in zip(range(start, stop), samples, strict=True)}


@st.composite
def orders(draw: Callable) -> tuple[Dataset, SampleOrder]:
    """One data set, or a mixture of up to three, under any seed, lanes and window."""
    seed, lanes, window = draw(st.integers(0, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 30))
    lists = draw(st.lists(shard_lists, min_size=1, max_size=3))
    if len(lists) == 1 and draw(st.booleans()):
        return InMemory(lists[0]), Order(lists[0], seed, lanes, window, draw(st.booleans()))
    weights = draw(st.lists(st.integers(1, 7), min_size=len(lists), max_size=len(lists)))
    limits = draw(st.lists(st.integers(0, 9), min_size=len(lists), max_size=len(lists)))
    names = "abc"[: len(lists)]
    sources = [Source(*given) for given in zip(names, weights, limits, strict=True)]
    dataset = MixedDataset(sources, [InMemory(sizes, name) for sizes, name in zip(lists, names, strict=True)])
    return dataset, dataset.order(seed, lanes, window)


@st.composite
def cases(draw: Callable) -> Case:
    dataset, order = draw(orders())
    return Case(dataset, order, draw(st.sampled_from(order.tails)))


def real(batch: Batch) -> dict[int, tuple[str, float]]:
    """Position to key and random number of a batch's samples, without padding."""
    rows = zip(batch.position.tolist(), batch.keys, batch.fields["random"].tolist(), batch.weight.tolist(), strict=True)
    return {position: (key, drawn) for position, key, drawn, weight in rows if weight}


# ------------------------------------------------------------------------------------------------------ one sequence


@given(case=cases(), batch=st.integers(1, 40), worlds=st.lists(st.integers(1, 7), min_size=2, max_size=2, unique=True))
@properties
def test_ranks_share_out_each_step_exactly_and_alike_in_every_world(case: Case, batch: int, worlds: list[int]) -> None:
    """At step s the ranks together hold exactly the positions of its span, in batches of one size."""
    assume(batch >= max(worlds) and (case.tail != "drop" or case.order.samples >= batch))
    steps = list(islice(case.spans(0, batch), 5))
    seen: list[list[dict[int, tuple[str, float]]]] = []
    for ranks in worlds:
        shares = [list(islice(case.loader(batch, rank, ranks), 5)) for rank in range(ranks)]
        assert {len(part) for part in shares} == {5}
        assert {len(one) for part in shares for one in part} == {-(-batch // ranks)}
        seen.append([{k: v for part in shares for k, v in real(part[step]).items()} for step in range(5)])
        assert sum(len(real(part[0])) for part in shares) == len(seen[-1][0])  # nothing twice
        for rank, part in enumerate(shares):
            assert {position % ranks for one in part for position in real(one)} <= {rank}
            assert all((one.position[one.weight == 0] == -1).all() for one in part)
    assert seen[0] == seen[1]
    for (start, stop), found in zip(steps, seen[0], strict=True):
        assert {position: key for position, (key, _) in found.items()} == case.keys(start, stop)


@given(
    case=cases(),
    phases=st.lists(st.tuples(st.integers(1, 5), st.integers(5, 30), st.integers(0, 4)), min_size=2, max_size=4),
)
@properties
def test_a_run_stopped_anywhere_goes_on_in_another_world_and_with_another_batch_size(
    case: Case, phases: list[tuple[int, int, int]]
) -> None:
    """Each phase has its ranks, its global batch size and its steps; the cursor of one rank starts all of the next."""
    assume(case.tail != "drop" or case.order.samples >= 30)
    state, position = case.loader(30, 0, 1).state_dict(), 0
    for ranks, batch, steps in phases:
        loaders = [case.loader(batch, rank, ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        batches = [iter(loader) for loader in loaders]
        for start, stop in islice(case.spans(position, batch), steps):
            found = {k: key for each in batches for k, (key, _) in real(next(each)).items()}
            assert found == case.keys(start, stop)
            position = stop
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[-1]
        assert state["position"] == position
        assert len(json.dumps(state)) < 300


@given(case=cases(), batch=st.integers(4, 30), ranks=st.integers(1, 4), workers=st.integers(1, 5))
@properties
def test_workers_that_take_turns_by_batch_change_nothing(case: Case, batch: int, ranks: int, workers: int) -> None:
    """Batch b is made by worker b mod W, from a copy of the loader's parts that sees no other batch."""
    assume(case.tail != "drop" or case.order.samples >= batch)
    loader = case.loader(batch, ranks - 1, ranks)
    copies = [pickle.loads(pickle.dumps(loader._fetch)) for _ in range(workers)]
    spans = list(islice(case.spans(0, batch), 6))
    for number, (alone, span) in enumerate(zip(loader, spans, strict=False)):
        helped = copies[number % workers][span].batch
        assert helped.keys == alone.keys
        assert helped.position.tolist() == alone.position.tolist()
        assert helped.weight.tolist() == alone.weight.tolist()
        assert real(helped) == real(alone)


def test_real_workers_of_a_mixture_change_nothing() -> None:
    sets = [InMemory((5, 0, 1, 9), "a"), InMemory((8, 3), "b")]
    dataset = MixedDataset([Source("a", 2), Source("b", 1)], sets)
    case = Case(dataset, dataset.order(lanes=4, window=3), "carry")
    alone, helped = (list(islice(case.loader(8, 1, 3, workers=workers), 7)) for workers in (0, 2))
    assert [real(batch) for batch in helped] == [real(batch) for batch in alone]


# ------------------------------------------------------------------------------------------------------ once an epoch


@given(found=orders(), epochs=st.integers(1, 3))
@properties
def test_every_sample_comes_once_in_each_epoch_of_its_source(found: tuple[Dataset, SampleOrder], epochs: int) -> None:
    dataset, order = found
    sizes = dataset.shard_sizes
    parts = [range(len(sizes))] if isinstance(order, Order) else _parts(order.shard_sizes)
    seen = places(order, range(epochs * order.samples))
    for shards in parts:
        everything = [(shard, index) for shard in shards for index in range(sizes[shard])]
        mine = [place for place in seen if place[0] in shards]
        for start in range(0, len(mine), len(everything)):
            walk = mine[start : start + len(everything)]
            assert len(set(walk)) == len(walk)
            assert set(walk) <= set(everything)
            assert len(walk) < len(everything) or sorted(walk) == everything


def _parts(shard_sizes: tuple[tuple[int, ...], ...]) -> list[range]:
    """Numbers of each source's shards."""
    ends = np.cumsum([len(sizes) for sizes in shard_sizes]).tolist()
    return [range(end - len(sizes), end) for end, sizes in zip(ends, shard_sizes, strict=True)]


@given(sizes=shard_lists, batch=st.integers(1, 25), ranks=st.integers(1, 5), shuffle=st.booleans())
@properties
def test_an_evaluation_counts_every_sample_once(sizes: tuple[int, ...], batch: int, ranks: int, shuffle: bool) -> None:
    assume(batch >= ranks)
    case = Case(InMemory(sizes), Order(sizes, lanes=3, window=4, shuffle=shuffle), "pad")
    shares = [list(case.loader(batch, rank, ranks, epochs=1)) for rank in range(ranks)]
    assert {len(part) for part in shares} == {-(-sum(sizes) // batch)}
    keys = [key for part in shares for one in part for key, _ in real(one).values()]
    assert sorted(keys) == sorted(f"memory/{s}/{i}" for s, size in enumerate(sizes) for i in range(size))


@given(seed=st.integers(0, 99), ranks=st.integers(2, 8), mixed=st.booleans(), sizes=st.sampled_from([9, 10, 16]))
@properties
def test_no_rank_keeps_its_shards_over_epochs(seed: int, ranks: int, mixed: bool, sizes: int) -> None:
    """64 shards and 16 lanes: a rank that reads a part of them reads another part in the next epoch.

    A rank whose number of ranks divides no lanes reads from all lanes, and so from nearly every shard; its samples
    are others then.
    """
    shards = (sizes,) * 64
    dataset = MixedDataset([Source("a", 1), Source("b", 1)], [InMemory(shards[:32], "a"), InMemory(shards[32:], "b")])
    order = dataset.order(seed, window=4) if mixed else Order(shards, seed, window=4)
    for rank in range(ranks):
        epochs = [share(e * order.samples, (e + 1) * order.samples, rank, ranks) for e in range(3)]
        seen = [places(order, positions) for positions in epochs]
        assert len({frozenset(samples) for samples in seen}) == 3
        if 16 % ranks == 0:
            assert len({frozenset(shard for shard, _ in samples) for samples in seen}) == 3


# ------------------------------------------------------------------------------------------------------ far and large


@given(found=orders(), far=st.integers(0, 10**12), count=st.integers(1, 60), seed=st.integers(0, 9))
@properties
def test_a_position_is_the_same_sample_from_wherever_it_is_asked(
    found: tuple[Dataset, SampleOrder], far: int, count: int, seed: int
) -> None:
    """Alone, among its neighbours, in any sequence, and by an order that was pickled."""
    _, order = found
    together = dict(zip(range(far, far + count), places(order, range(far, far + count)), strict=True))
    mixed_up = np.random.default_rng(seed).permutation(count) + far
    assert dict(zip(mixed_up.tolist(), places(order, mixed_up), strict=True)) == together
    assert places(order, [far]) == [together[far]]
    again: list[Place] = places(pickle.loads(pickle.dumps(order)), range(far, far + count))
    assert again == list(together.values())


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), few=st.integers(1, 12))
@properties
def test_few_numbers_are_permuted_as_many_are(size: int, key: int, few: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    many = permute(np.arange(size), np.full(size, size), keys)
    some = np.arange(size)[:: max(1, size // few)]
    assert permute(some, np.full(len(some), size), keys[: len(some)]).tolist() == many[some].tolist()


PLAN = """
import resource, time
import numpy as np
from dltrain.data.order import Order
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, times = peak(), []
for attempt in range(5):
    begun = time.perf_counter()
    order = Order((10**6,) * 10_000, seed=attempt)
    order.locate(np.arange(256) + 7 * 10**9)
    middle = time.perf_counter()
    order.locate(np.arange(256) + 3 * 10**10 + 5)
    times += [middle - begun, time.perf_counter() - middle]
print(min(times[::2]) * 1e3, min(times[1::2]) * 1e3, peak() - before)
"""


def test_a_plan_of_ten_thousand_million_samples_takes_milliseconds_and_megabytes() -> None:
    """10,000 shards: the first 256 samples anywhere, in a first and in another epoch, in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, check=True)
    first, next_epoch, mebibytes = map(float, done.stdout.split())
    assert first < 20
    assert next_epoch < 20
    assert mebibytes < 50


def test_the_list_of_shards_is_not_looked_at_again() -> None:
    """Hashing a hundred thousand numbers for every batch would take as long as the rest of its plan."""
    order = Order((10,) * 1000)
    before = places(order, range(100))
    object.__setattr__(order, "shard_sizes", None)
    assert places(order, range(100)) == before
    assert places(order, range(30_000, 30_100)) != before
