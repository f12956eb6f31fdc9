"""One file per picture and torchvision's ImageFolder: what everybody begins with. Local files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.data_peers.crops import cropper
from benchmarks.data_peers.job import Job
from dltrain.models.vision.torchvision import import_torchvision


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members, or crops: ``own`` is Pillow, its default loader."""
    import_torchvision()
    from torchvision.datasets import ImageFolder

    random = Random(0)
    crop = cropper("pillow" if job.decoder == "own" else job.decoder) if job.decoder else None
    data = ImageFolder(job.url, loader=lambda path: Path(path).read_bytes())

    def epoch(number: int) -> Iterator[Any]:
        places = list(range(len(data)))
        Random(number).shuffle(places)
        for place in places:
            jpg, label = data[place]
            yield crop(jpg, random) if crop else (jpg, b"%d" % label)

    return epoch


def windows(job: Job) -> Iterator[dict[str, Any]]:
    """Windows cut by hand from a memory map of every file, each copied out: as little as there can be to do."""
    import time

    import numpy as np

    series = [np.load(path, mmap_mode="r") for path in sorted(Path(job.url).iterdir())]
    random, steps = np.random.default_rng(0), job.steps
    yield {"ready": True}
    while True:
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < job.seconds:
            chosen = random.integers(len(series), size=job.batch).tolist()
            first = random.integers(len(series[0]) - steps + 1, size=job.batch).tolist()
            for place, start in zip(chosen, first, strict=True):
                np.array(series[place][start : start + steps])
            count += job.batch
        yield {"samples": count, "seconds": time.perf_counter() - started}
