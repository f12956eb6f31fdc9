"""dltrain: the one contestant that runs in the project's interpreter, by the public API that its users have."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.data_peers.crops import SIZE, cropper
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.resuming import Stamp, timed_resume
from dltrain.data.dataset import Cache, open_dataset
from dltrain.data.order import Order
from dltrain.data.sample import Sample
from dltrain.data.stream import stream
from dltrain.data.windows import Window


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members or crops, in random order. The data set is opened anew in every epoch, with an empty cache: nothing
    is left from before, so that indexes are read, and checksums verified, each time."""
    if job.variant == "loader":
        return _loader_epochs(job)
    shown = _shown(job)

    def epoch(number: int) -> Iterator[Any]:
        cache = Path(job.scratch) / f"dltrain-{number}"
        dataset = open_dataset(job.url, cache=Cache(folder=str(cache)))
        order = Order(dataset.shard_sizes, seed=0)
        first = number * order.samples
        samples = stream(dataset, order, start=first, stop=first + order.samples, read=job.batch)
        yield from map(shown, samples)
        shutil.rmtree(cache, ignore_errors=True)

    return epoch


def _shown(job: Job) -> Callable[[Sample], Any]:
    """What is made of a sample."""
    if not job.decoder:
        return lambda sample: (bytes(sample.fields["jpg"]), bytes(sample.fields["cls"]))
    if job.decoder == "own":
        from dltrain.data.decode import decode_crop

        generator = np.random.default_rng(0)
        return lambda sample: decode_crop(sample, "jpg", SIZE, generator)
    crop, random = cropper(job.decoder), Random(0)
    return lambda sample: crop(bytes(sample.fields["jpg"]), random)


def _loader_epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Crops through the loader, as a training has them: batches of tensors."""
    from dltrain.data.decode import decode_crop
    from dltrain.data.loader import Loader

    def crop(sample: Sample, generator: np.random.Generator | None) -> dict[str, Any]:
        return {"crop": decode_crop(sample, "jpg", SIZE, generator)}

    dataset = open_dataset(job.url)
    order = Order(dataset.shard_sizes, seed=0)
    loader = Loader(dataset, order, crop, global_batch_size=job.batch, augment=True)
    batches = iter(loader)

    def epoch(number: int) -> Iterator[Any]:
        while loader.position < (number + 1) * loader.samples:
            yield next(batches).fields["crop"].numpy()

    return epoch


def resume(job: Job) -> Iterator[dict[str, Any]]:
    """A cursor at the position, given to a loader of a new job. The batch must be the one that stands there."""
    from dltrain.data.loader import Loader

    def first_batch(stamp: Stamp) -> Any:
        dataset = open_dataset(job.url)
        order = Order(dataset.shard_sizes, seed=0)
        loader = Loader(dataset, order, _Take(stamp), global_batch_size=job.batch, workers=job.workers)
        loader.load_state_dict({**loader.state_dict(), "position": job.position})
        batch = next(iter(loader))
        if batch.position[0] != job.position:
            raise AssertionError(f"resumed at {batch.position[0]}, not at {job.position}")
        return batch

    while True:
        yield timed_resume(job.scratch, job.workers, first_batch)


class _Take:
    """A task's ``sample``; a worker that has unpickled it is up."""

    def __init__(self, stamp: Stamp) -> None:
        self._stamp = stamp

    def __call__(self, sample: Sample, generator: np.random.Generator | None) -> dict[str, Any]:
        return {"bin": np.frombuffer(sample.fields["bin"], dtype=np.uint8)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stamp()


def windows(job: Job) -> Iterator[dict[str, Any]]:
    """Windows of ``steps`` steps in random order. Each has bytes of its own: nothing is left to copy."""
    dataset = open_dataset(job.url, window=Window(lookback=job.steps - 1, horizon=1))
    order = Order(dataset.shard_sizes, seed=0)
    place = 0
    yield {"ready": True}
    while True:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < job.seconds:
            dataset.read(*order.locate(np.arange(place, place + job.batch)))
            place, count = place + job.batch, count + job.batch
        yield {"samples": count, "seconds": time.perf_counter() - started}
