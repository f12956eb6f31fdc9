"""What a training would read, worked out from the manifest alone: no shard is opened and nothing is downloaded.

Downloads are those of every node's cache, walked window by window (:mod:`dltrain.data.timeline`), for a network that
keeps up and without faults. Not counted are requests sent again, the ranges by which a very first batch may be read
before its shards have come, and what is fetched ahead beyond the end. Samples are those of the manifest: a recipe that
takes windows from time series has as many as its windows.

    plan = make_plan(load_manifest("s3://bucket/imagenet/train"), Training(nodes=16, epochs=10))
    print(plan.downloaded_bytes, plan.get_requests)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

import numpy as np

from dltrain.data.cached import EXPECTED_RATE, PATIENCE
from dltrain.data.manifest import Manifest
from dltrain.data.order import Integers, Order, Pass, step_span, steps_between
from dltrain.data.reader import INDEXES_KEPT
from dltrain.data.route import Route
from dltrain.data.timeline import Timeline, crowd
from dltrain.errors import UserError
from dltrain.storage.ranges import SMALL, SMALLEST_PART

ROUND_TRIP = 0.03
"""Seconds until the first byte of an answer."""

_BYTES_PER_SHARD = 1200  # of a process's lists: the manifest's line, names in the cache, the order's arrays (measured)
_MOST_WINDOWS = 1 << 18
_MOST_POSITIONS = 1 << 16


@dataclass(frozen=True)
class Training:
    """The training to plan for; names and defaults as in the config where it has them."""

    nodes: int = 1
    ranks_per_node: int = 1
    global_batch_size: int = 64
    epochs: int = 1
    seed: int = 0
    lanes: int = 16
    window: int = 4096
    cache_bytes: int = 0
    """What each node's cache may hold; 0 is no limit."""
    part_bytes: int = 8 << 20
    in_flight: int = 16
    ahead_bytes: int = 1 << 30
    price_get: float = 0.0004
    """US dollars for 1,000 GET requests."""
    price_transfer: float = 0.0
    """US dollars for 10^9 bytes sent to the nodes."""
    megabits: float = 10_000.0
    """Megabits per second that a node gets from the store."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Plan:
    """What was worked out; sizes in bytes, distances in samples, times in seconds, costs in US dollars."""

    samples_per_epoch: int
    steps_per_epoch: int
    """Steps until the first epoch is over."""
    steps: int
    """Of all epochs, the last batch of each filled from the next."""
    dataset_bytes: int
    """Shards with their indexes."""
    downloaded_bytes_per_node: int
    """Of all epochs, on the node that downloads most."""
    downloaded_bytes: int
    """Of all epochs, on all nodes together."""
    times_dataset: float
    """The same as a multiple of the data set."""
    times_dataset_by_epoch: tuple[float, ...]
    """Shards and indexes alone."""
    get_requests: int
    cost: float
    """Of requests and transfer."""
    cache_required_bytes: int
    """A training with a smaller cache is refused."""
    cache_once_bytes: int
    """The smallest cache with which no node loads a shard twice in an epoch."""
    cache_all_bytes: int
    """The smallest cache with which no node ever loads a shard twice."""
    shards_per_window_mean: float
    """Shards whose samples one window of a lane shuffles together."""
    shards_per_window_max: int
    shards_mixed_mean: float
    """The same over all lanes: the shards that the samples of neighbouring batches come from."""
    shards_mixed_max: int
    neighbour_distance_mean: float
    """Places in the order between two samples that are neighbours in their shard."""
    neighbour_distance_max: int
    neighbour_distance_of_full_shuffle: float
    """The mean distance as a part of that after shuffling all samples at once: a third of the data set."""
    first_batch_seconds: float
    """At best: what is fetched ahead meanwhile takes its part of the network."""
    first_window_seconds: float
    """Until all shards of the first window are there, at best: from then on what is asked for is on the node's disk."""
    memory_bytes_per_process: int
    """Of a rank and of each of its loader processes, for lists and indexes; without batches and decoding."""
    batch_bytes_per_rank: int
    """Bytes of the samples of a rank's batch as they lie in their shards."""

    def as_json(self) -> dict[str, Any]:
        """Numbers by name, for one line of JSON."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def make_plan(manifest: Manifest, training: Training, manifest_bytes: int = 0) -> Plan:
    """Plan a training on the data set of ``manifest``, whose file has ``manifest_bytes``.

    Raises :class:`UserError` for what the training itself would be refused for: a batch smaller than the ranks, a cache
    too small for two windows.
    """
    _refuse_nonsense(training)
    table = _Table.of(manifest)
    samples, batch = int(table.samples.sum()), training.global_batch_size
    order = Order(tuple(table.samples.tolist()), training.seed, training.lanes, training.window)
    required = _required_cache(order, table, training)
    _refuse_small_cache(required, training)
    lines = Timeline.of(order, len(table.samples), training.nodes, training.epochs + 1)
    return Plan(
        samples_per_epoch=samples,
        steps_per_epoch=steps_between(0, samples, samples, batch, "carry"),
        steps=steps_between(0, training.epochs * samples, samples, batch, "carry"),
        dataset_bytes=int(table.bytes.sum()),
        **_traffic(lines, table, training, manifest_bytes),
        cache_required_bytes=required,
        cache_once_bytes=max(line.peak(table.bytes, epoch) for line in lines for epoch in range(training.epochs)),
        cache_all_bytes=max(_all_bytes(line, table, training.epochs) for line in lines),
        **_mixing(order, len(table.samples)),
        **_distances(order),
        **_start(order, lines[0], table, training, manifest_bytes),
        memory_bytes_per_process=_memory(lines[0], table, training.epochs),
        batch_bytes_per_rank=int(-(-batch // training.ranks) * table.shard_bytes.sum() / samples),
    )


@dataclass(frozen=True)
class _Table:
    """The manifest's columns, [shards] each."""

    samples: Integers
    shard_bytes: Integers
    index_bytes: Integers

    @classmethod
    def of(cls, manifest: Manifest) -> _Table:
        rows = [(shard.samples, shard.bytes, shard.index_bytes) for shard in manifest.shards]
        return cls(*np.array(rows, dtype=np.int64).T)

    @property
    def bytes(self) -> Integers:
        """What a shard takes in the cache and on its way there: it comes with its index."""
        return self.shard_bytes + self.index_bytes

    def requests(self, training: Training) -> Integers:
        """GETs that fetch a shard and its index."""
        return requests_of(self.shard_bytes, training) + requests_of(self.index_bytes, training)


def requests_of(size: Integers, training: Training) -> Integers:
    """GETs that read so many bytes: parts as :mod:`dltrain.storage.ranges` makes them, smaller for a short read."""
    share = -(-size // training.in_flight >> 20) + 1 << 20
    return -(-size // np.minimum(training.part_bytes, np.maximum(SMALLEST_PART, share)))


def _refuse_nonsense(training: Training) -> None:
    for name in ("nodes", "ranks_per_node", "epochs", "lanes", "window", "part_bytes", "in_flight", "megabits"):
        if getattr(training, name) <= 0:
            raise UserError(f"{name} is {getattr(training, name)}; give more than 0")
    for name in ("seed", "cache_bytes", "ahead_bytes", "price_get", "price_transfer"):
        if getattr(training, name) < 0:
            raise UserError(f"{name} is {getattr(training, name)}; give 0 or more")
    if training.global_batch_size < training.ranks:
        raise UserError(
            f"the global batch size is {training.global_batch_size}, smaller than the {training.ranks} ranks; "
            f"give at least {training.ranks}, or plan for fewer ranks"
        )


def _required_cache(order: Order, table: _Table, training: Training) -> int:
    """What :meth:`dltrain.data.cached.CachedFiles.follow` asks for, on the node that needs most."""
    kinds = range(gcd(training.nodes, training.lanes))
    routes = [Route(order, table.shard_bytes, node, training.nodes) for node in kinds]
    two_windows = max(max(route.needed(0), route.needed(1)) for route in routes) + int(table.shard_bytes.max())
    return min(two_windows, int(table.shard_bytes.sum())) + int(table.index_bytes.sum())


def _refuse_small_cache(required: int, training: Training) -> None:
    if 0 < training.cache_bytes < required:
        raise UserError(
            f"a cache of {training.cache_bytes / 2**30:.3f} GiB would be refused: two windows and a shard on its way "
            f"need {-(-required * 1000 // 2**30) / 1000:.3f} GiB; give the cache at least that, or take a smaller "
            "window or fewer lanes"
        )


def _traffic(lines: list[Timeline], table: _Table, training: Training, manifest_bytes: int) -> dict[str, Any]:
    """Bytes and requests of all nodes: those whose number leaves the same rest read the same lanes."""
    alike, sizes, gets = training.nodes // len(lines), table.bytes, table.requests(training)
    by_epoch, requests, most = np.zeros(training.epochs), 0, 0
    for line in lines:
        loads = line.loads(sizes, training.cache_bytes, training.ahead_bytes) & (line.epoch < training.epochs)
        mine = np.bincount(line.epoch[loads], sizes[line.shard[loads]], training.epochs)
        by_epoch += alike * mine
        requests += alike * int(gets[line.shard[loads]].sum())
        most = max(most, int(mine.sum()))
    requests += training.ranks * _manifest_requests(manifest_bytes, training)
    total = int(by_epoch.sum()) + training.ranks * manifest_bytes
    whole = int(sizes.sum())
    return {
        "downloaded_bytes_per_node": most + training.ranks_per_node * manifest_bytes,
        "downloaded_bytes": total,
        "times_dataset": total / whole,
        "times_dataset_by_epoch": tuple((by_epoch / whole).tolist()),
        "get_requests": requests,
        "cost": requests / 1000 * training.price_get + total / 1e9 * training.price_transfer,
    }


def _manifest_requests(size: int, training: Training) -> int:
    rest = np.array([max(0, size - SMALL)])
    return 1 + int(requests_of(rest, training)[0]) if size else 0


def _all_bytes(line: Timeline, table: _Table, epochs: int) -> int:
    return int(table.bytes[np.unique(line.shard[line.epoch < epochs])].sum())


def _mixing(order: Order, shards: int) -> dict[str, Any]:
    """Shards that meet in one window, in a lane and over all lanes, in the first epoch."""
    counts = _shards_per_window(order, order.walk(0))
    line = Timeline.of(order, shards, nodes=1, epochs=1)[0]
    most, mean = crowd(line.first, line.last + 1, np.ones(len(line.shard), dtype=np.int64))
    return {
        "shards_per_window_mean": float(counts.mean()),
        "shards_per_window_max": int(counts.max()),
        "shards_mixed_mean": mean,
        "shards_mixed_max": most,
    }


def _shards_per_window(order: Order, walk: Pass) -> Integers:
    """Shards under each window of each lane; of very many windows, as many as are quickly counted."""
    starts = walk.starts[np.append(walk.starts[1:], order.samples) > walk.starts]  # without empty shards
    windows = -(-walk.lane_sizes // order.window)
    ends = np.cumsum(windows)
    chosen = np.arange(0, ends[-1], -(-int(ends[-1]) // _MOST_WINDOWS))
    lane = np.searchsorted(ends, chosen, side="right")
    inside = (chosen - (ends - windows)[lane]) * order.window
    begin = walk.lane_starts[lane] + inside
    last = begin + np.minimum(order.window, walk.lane_sizes[lane] - inside) - 1
    return np.searchsorted(starts, last, side="right") - np.searchsorted(starts, begin, side="right") + 1


def _distances(order: Order) -> dict[str, Any]:
    """Where a permutation puts two neighbours of a lane, in the mean over all permutations.

    Two different places of w lie (w + 1) / 3 apart in the mean; places in neighbouring windows of w and v samples
    (w + v) / 2. A place of a lane is as many positions as there are lanes.
    """
    sizes = np.asarray(order.walk(0).lane_sizes, dtype=np.float64)
    window = np.minimum(order.window, sizes)
    whole = np.floor_divide(sizes, np.maximum(window, 1))
    rest = sizes - whole * window
    inside = whole * (window - 1) * (window + 1) / 3 + np.maximum(rest - 1, 0) * (rest + 1) / 3
    between = np.maximum(whole - 1, 0) * window + (rest > 0) * (whole > 0) * (window + rest) / 2
    pairs = np.maximum(sizes - 1, 0).sum()
    mean = order.lanes * float((inside + between).sum() / max(pairs, 1))
    most = np.where(whole > 1, 2 * window, np.where(rest > 0, window + rest, window)).max() - 1
    full = (order.samples + 1) / 3
    return {
        "neighbour_distance_mean": mean,
        "neighbour_distance_max": int(order.lanes * most),
        "neighbour_distance_of_full_shuffle": mean / full,
    }


def _start(order: Order, line: Timeline, table: _Table, training: Training, manifest_bytes: int) -> dict[str, Any]:
    """Manifest, then indexes, then the first samples: from their whole shards, or by ranges where that would be long.

    Samples read by ranges share the network with the shards fetched ahead, and get half of it.
    """
    _, stop = step_span(0, order.samples, min(training.global_batch_size, _MOST_POSITIONS), "carry")
    positions = np.arange(0, stop, training.nodes, dtype=np.int64)
    shards = np.unique(order.locate(positions)[0])
    of_rank = np.unique(order.locate(positions[:: training.ranks_per_node])[0])
    rate, head = training.megabits * 1e6 / 8, training.ranks_per_node * manifest_bytes
    whole = head + int(table.bytes[shards].sum())
    if table.shard_bytes[of_rank].sum() > PATIENCE * EXPECTED_RATE:
        ranged = training.global_batch_size / training.nodes * table.shard_bytes.sum() / order.samples
        whole = min(whole, head + int(table.index_bytes[shards].sum()) + int(2 * ranged))
    first = np.unique(line.shard[line.first == 0])
    return {
        "first_batch_seconds": 3 * ROUND_TRIP + whole / rate,
        "first_window_seconds": 3 * ROUND_TRIP + (head + int(table.bytes[first].sum())) / rate,
    }


def _memory(line: Timeline, table: _Table, epochs: int) -> int:
    met = len(np.unique(line.shard[line.epoch < epochs]))
    return int(_BYTES_PER_SHARD * len(table.samples) + min(INDEXES_KEPT, met) * table.index_bytes.mean())


def _rounded(value: Any) -> Any:
    return np.round(value, 6).tolist() if isinstance(value, float | tuple) else value
