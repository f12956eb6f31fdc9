"""mosaicml-streaming: its own MDS shards, from local files or downloaded from S3 before they are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.data_peers.crops import cropper
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.resuming import Stamp, timed_resume
from dltrain.models.vision.torchvision import import_torchvision

PREDOWNLOAD = 4096
"""Samples it may run ahead: with its default of 8 batches its threads wait for each other, four times as long."""

SHARD_BYTES = {"photos": 38 << 20, "small": 5 << 20}


def write(job: Job) -> Iterator[dict[str, Any]]:
    """Members as bytes: its own JPEG column keeps the file's bytes too, and opens them by Pillow when reading."""
    writer = import_streaming().MDSWriter
    columns = {"bin": "bytes"} if job.variant == "small" else {"jpg": "bytes", "cls": "bytes"}
    with writer(out=job.url, columns=columns, size_limit=SHARD_BYTES[job.variant]) as out:
        for sample in (_small if job.variant == "small" else _photos)(Path(job.source)):
            out.write(sample)
    yield {}


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members, or crops: ``own`` is Pillow."""
    random = Random(0)
    crop = cropper("pillow" if job.decoder == "own" else job.decoder) if job.decoder else None
    kept = None if job.url.startswith("s3://") else _dataset(job, _own_name(job))

    def epoch(number: int) -> Iterator[Any]:
        folder = f"{job.scratch}/mosaic-{number}"
        for sample in kept or _dataset(job, folder):
            yield crop(sample["jpg"], random) if crop else (sample["jpg"], sample["cls"])
        shutil.rmtree(folder, ignore_errors=True)

    return epoch


def resume(job: Job) -> Iterator[dict[str, Any]]:
    """The state of a loader that had handed out ``position`` samples, given to a loader of a new job."""
    streaming = import_streaming()

    def first_batch(stamp: Stamp) -> Any:
        data = _dataset(job, _own_name(job))
        loader = streaming.StreamingDataLoader(
            data, batch_size=job.batch, num_workers=job.workers, worker_init_fn=stamp, collate_fn=list
        )
        seen = job.position // job.batch * job.batch
        loader.load_state_dict(data.state_dict(num_samples=seen, from_beginning=True))
        return next(iter(loader))

    while True:
        yield timed_resume(job.scratch, job.workers, first_batch)


def _dataset(job: Job, local: str) -> Any:
    remote = job.url if job.url.startswith("s3://") else None
    settings = {"shuffle": True, "batch_size": job.batch, "predownload": PREDOWNLOAD}
    return import_streaming().StreamingDataset(local=local, remote=remote, **settings)


def import_streaming() -> Any:
    """The package. It imports torchvision, which beside a CPU build of torch needs help to be imported at all."""
    import_torchvision()
    import streaming  # type: ignore[import-not-found]

    return streaming


def _own_name(job: Job) -> str:
    """The data's folder under a name of this process's own: it refuses one that another process has open."""
    name = Path(job.scratch) / "mosaic"
    name.unlink(missing_ok=True)
    name.symlink_to(job.url)
    return str(name)


def _photos(folder: Path) -> Iterator[dict[str, bytes]]:
    for path in sorted(folder.glob("*/*.jpg"), key=lambda path: path.stem):
        yield {"jpg": path.read_bytes(), "cls": path.parent.name.encode()}


def _small(folder: Path) -> Iterator[dict[str, bytes]]:
    from benchmarks.data_peers.tars import members

    for shard in sorted(folder.glob("*.tar")):
        for _, data in members(shard.open("rb")):
            yield {"bin": data}
