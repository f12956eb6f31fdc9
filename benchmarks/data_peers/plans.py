"""What it takes to know an epoch's order: the longest of several questions, and memory above an interpreter with numpy.

Imports nothing but numpy before it looks at the memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.data_peers.job import Job
from benchmarks.data_peers.worker import peak_memory

SHARDS = 10_000
QUESTIONS, POSITIONS = 20, 256


def ours(job: Job) -> Iterator[dict[str, Any]]:
    """Where 256 random positions of 10^10 samples lie, each time in an epoch that nobody asked for before."""
    before = peak_memory()
    from dltrain.data.order import Order

    order = Order((10**6,) * SHARDS, seed=0)
    random, seconds = np.random.default_rng(0), []
    for epoch in range(QUESTIONS):
        positions = random.integers(order.samples, size=POSITIONS) + epoch * order.samples
        started = time.perf_counter()
        order.locate(positions)
        seconds.append(time.perf_counter() - started)
    yield {"seconds": max(seconds), "bytes": peak_memory() - before, "samples": order.samples}


def mosaic(job: Job) -> Iterator[dict[str, Any]]:
    """The order of an epoch of 10^7 samples, as streaming makes it at the start of an epoch."""
    from benchmarks.data_peers.mosaic import import_streaming

    import_streaming()
    from streaming.base.partition import get_partitions  # type: ignore[import-not-found]
    from streaming.base.shuffle import get_shuffle  # type: ignore[import-not-found]

    samples = 10**7
    before, started = peak_memory(), time.perf_counter()
    places = get_partitions("relaxed", samples, 1, 1, 1, 1, 64, 0)
    shuffle = get_shuffle("py1e", np.full(SHARDS, samples // SHARDS), 1, 0, 0, 1 << 18)
    np.where(places != -1, shuffle[places], -1)
    yield {"seconds": time.perf_counter() - started, "bytes": peak_memory() - before, "samples": samples}
