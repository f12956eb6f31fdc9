"""webdataset 1.0: its shuffled pipeline over tars, from local files or from S3.

It has no scheme for S3: its users open objects by a handler of their own (here boto3) or through ``pipe:aws s3 cp``.
It has no state either: to resume is to read again up to the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from benchmarks.data_peers.crops import crop_image, cropper
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.resuming import Stamp, skip, timed_resume

SHUFFLE_BUFFER = 1000


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members, or crops: ``own`` is its decoder to Pillow images."""
    random = Random(0)
    data = _pipeline(job)
    if not job.decoder:
        return lambda number: data.to_tuple("jpg", "cls")
    if job.decoder == "own":
        decoded = data.decode("pil").to_tuple("jpg").map(lambda sample: crop_image(sample[0], random))
        return lambda number: decoded
    crop = cropper(job.decoder)
    cropped = data.to_tuple("jpg").map(lambda sample: crop(sample[0], random))
    return lambda number: cropped


def resume(job: Job) -> Iterator[dict[str, Any]]:
    """Replays: every sample before the position is read anew."""
    from torch.utils.data import DataLoader

    def first_batch(stamp: Stamp) -> Any:
        data = _pipeline(job).to_tuple("bin")
        loader = DataLoader(data, batch_size=job.batch, num_workers=job.workers, worker_init_fn=stamp)
        return skip(iter(loader), job.position // job.batch)

    while True:
        yield timed_resume(job.scratch, job.workers, first_batch)


def _pipeline(job: Job) -> Any:
    import webdataset

    if job.url.startswith("s3://") and job.variant != "aws":
        webdataset.gopen_schemes["s3"] = _open_by_boto3
    urls = [f"{job.url}/{shard}" for shard in job.shards]
    if job.variant == "aws":
        urls = [f"pipe:aws s3 cp {url} -" for url in urls]
    return webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_BUFFER)


def _open_by_boto3(url: str, *arguments: Any, **settings: Any) -> Any:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]
