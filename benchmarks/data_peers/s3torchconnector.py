"""AWS's connector: objects as streams. Its users read tar shards through Python's tarfile, as AWS's examples do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from benchmarks.data_peers.crops import cropper
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.tars import members


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members, or crops: ``own`` is Pillow, for it has no decoder."""
    random = Random(0)
    crop = cropper("pillow" if job.decoder == "own" else job.decoder) if job.decoder else None

    def epoch(number: int) -> Iterator[Any]:
        shards = [f"{job.url}/{shard}" for shard in job.shards]
        Random(number).shuffle(shards)
        for jpg, cls in _samples(shards):
            yield crop(jpg, random) if crop else (jpg, cls)

    return epoch


def _samples(urls: list[str]) -> Iterator[tuple[bytes, bytes]]:
    from s3torchconnector import S3ClientConfig, S3IterableDataset  # type: ignore[import-not-found]

    objects = S3IterableDataset.from_objects(
        urls,
        region=os.environ["AWS_DEFAULT_REGION"],
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        s3client_config=S3ClientConfig(force_path_style=True),
    )
    for reader in objects:
        data = iter(members(reader))
        for (_, jpg), (_, cls) in zip(data, data, strict=True):
            yield jpg, cls
