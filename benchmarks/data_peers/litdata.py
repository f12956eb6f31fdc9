"""litData: its own chunks, from local files or from S3 through obstore."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.data_peers.crops import SIZE, Pixels, cropper, random_box
from benchmarks.data_peers.job import Job
from benchmarks.data_peers.resuming import Stamp, skip, timed_resume
from dltrain.models.vision.torchvision import import_torchvision

PER_CHUNK = {"photos": 500, "small": 10_000}


def write(job: Job) -> Iterator[dict[str, Any]]:
    """Members as bytes; under ``jpeg`` as its own type, which it decodes by itself when reading."""
    import litdata  # type: ignore[import-not-found]

    function, inputs, per_chunk = {"small": _small, "photos": _photos, "jpeg": _jpegs}[job.variant](job)
    litdata.optimize(fn=function, inputs=inputs, output_dir=job.url, chunk_size=per_chunk, num_workers=1)
    yield {}


def epochs(job: Job) -> Callable[[int], Iterable[Any]]:
    """Raw members, or crops: ``own`` is its decoder, torchvision's."""
    if job.url.startswith("s3://"):
        _allow_http()
    if job.decoder == "own":
        import_torchvision()
    random = Random(0)
    crop = None if job.decoder in ("", "own") else cropper(job.decoder)
    kept = None if job.url.startswith("s3://") else _dataset(job, Path(job.scratch))

    def epoch(number: int) -> Iterator[Any]:
        cache = Path(job.scratch) / f"litdata-{number}"
        for sample in kept or _dataset(job, cache):
            if job.decoder == "own":
                yield _crop_planes(sample["jpg"], random)
            elif crop:
                yield crop(bytes(sample["jpg"]), random)
            else:
                yield bytes(sample["jpg"]), bytes(sample["cls"])
        shutil.rmtree(cache, ignore_errors=True)

    return epoch


def resume(job: Job) -> Iterator[dict[str, Any]]:
    """A state taken at the position, given to a loader of a new job."""
    import litdata

    def loader(stamp: Stamp | None) -> Any:
        data = _dataset(job, Path(job.scratch))
        return litdata.StreamingDataLoader(
            data, batch_size=job.batch, num_workers=job.workers, worker_init_fn=stamp, collate_fn=_copied
        )

    stopped = loader(None)
    batches = iter(stopped)
    skip(batches, job.position // job.batch - 1)
    state = stopped.state_dict()

    def first_batch(stamp: Stamp) -> Any:
        resumed = loader(stamp)
        resumed.load_state_dict(state)
        return next(iter(resumed))

    while True:
        yield timed_resume(job.scratch, job.workers, first_batch)


def _dataset(job: Job, cache: Path) -> Any:
    import litdata

    remote = {"cache_dir": str(cache)} if job.url.startswith("s3://") else {}
    cache.mkdir(parents=True, exist_ok=True)
    # by default it decodes windows of samples, again for every sample where these are shuffled: a quarter of the speed
    return litdata.StreamingDataset(job.url, shuffle=True, drop_last=False, batch_decode=1, **remote)


def _copied(samples: list[Any]) -> list[bytes]:
    """Views of its memory cannot leave the worker."""
    return [bytes(sample) for sample in samples]


def _allow_http() -> None:
    """As released it refuses an endpoint without TLS, and has no option for it; AWS's own is never one."""
    from litdata.streaming import downloader  # type: ignore[import-not-found]

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def _crop_planes(planes: Any, random: Random) -> Pixels:
    """From its tensor uint8 [3, height, width]."""
    from torch.nn.functional import interpolate

    left, upper, right, lower = random_box(planes.shape[2], planes.shape[1], random)
    part = planes[None, :, upper:lower, left:right]
    crop: Pixels = interpolate(part, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return crop


def _photos(job: Job) -> tuple[Callable[[str], Any], list[str], int]:
    return _read_photo, [str(path) for path in sorted(Path(job.source).glob("*/*.jpg"))], PER_CHUNK["photos"]


def _jpegs(job: Job) -> tuple[Callable[[str], Any], list[str], int]:
    return _read_jpeg, _photos(job)[1], PER_CHUNK["photos"]


def _small(job: Job) -> tuple[Callable[[str], Any], list[str], int]:
    return _read_small, [job.source], PER_CHUNK["small"]


def _read_photo(path: str) -> dict[str, bytes]:
    return {"jpg": Path(path).read_bytes(), "cls": Path(path).parent.name.encode()}


def _read_jpeg(path: str) -> dict[str, Any]:
    import litdata

    return {"jpg": litdata.Jpeg(path=path), "cls": Path(path).parent.name.encode()}


def _read_small(folder: str) -> Iterator[bytes]:
    from benchmarks.data_peers.tars import members

    for shard in sorted(Path(folder).glob("*.tar")):
        for _, data in members(shard.open("rb")):
            yield data
