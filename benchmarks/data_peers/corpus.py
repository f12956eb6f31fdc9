"""The files that all contestants read: made once from a seed, kept in a folder named by a hash of what made them.

corpus = Corpus(work, samples=2000)
corpus.build()
corpus.path("photos", "shards")    # webdataset's tars and ours: the same files
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.data.writer import ShardWriter
from dltrain.runtime.environment import cores

BUCKET = "data"
"""The folder of what is served by S3 too."""

CLASSES = 10
SCALES = ((2, 45.0), (5, 30.0), (12, 20.0), (30, 14.0), (75, 10.0))
"""Cells across the picture and their standard deviation, of 255: a photograph's energy falls with frequency."""

FINEST, FINEST_DEVIATION = 180, (10.0, 60.0)
"""The last scale's deviation differs by picture, and with it the size of the JPEG: 45 to 110 KB, 75 on average."""


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    photos: int = 2000
    shards: int = 4
    width: int = 500
    height: int = 375
    quality: int = 90
    small: int = 200_000
    small_bytes: int = 512
    small_shards: int = 20
    series: int = 500
    steps: int = 4000
    channels: int = 8
    seed: int = 0


class Corpus:
    """Photographs, small samples and long series, each in the formats of those that read them."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        made_by = [
            Path(str(import_module(f"dltrain.data.{name}").__file__)) for name in ("index", "manifest", "writer")
        ]
        photos = _hash(asdict(sizes), Path(__file__).read_text())
        self._files = work / f"photos-{photos}"
        self.folder = work / f"corpus-{_hash(photos, *(path.read_text() for path in made_by))}"

    def path(self, what: str, form: str) -> Path:
        """Where ``what`` (photos, small, series) lies in one form (shards, files, or a peer's name)."""
        return self._files / what if form == "files" else self.folder / BUCKET / what / form

    @property
    def photo_bytes(self) -> int:
        """Of all JPEGs and their classes, one digit each."""
        return sum(path.stat().st_size + 1 for path in photo_paths(self.path("photos", "files")))

    def build(self) -> None:
        """Make what is missing of the files and of the shards; peers write their own forms from these."""
        self.make("photos", "files", self._write_photos)
        self.make("series", "files", self._write_series)
        self.make("photos", "shards", self._shard_photos)
        self.make("series", "shards", self._shard_series)
        self.make("small", "shards", self._shard_small)

    def make(self, what: str, form: str, write: Callable[[Path], object]) -> None:
        """Have ``write`` fill the folder unless it is there; it appears whole or not at all."""
        path = self.path(what, form)
        if path.is_dir():
            return
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        print(f"making {what} as {form} ...", flush=True)
        write(partial)
        partial.rename(path)

    def _write_photos(self, folder: Path) -> None:
        for label in range(CLASSES):
            (folder / f"{label}").mkdir()
        with ProcessPoolExecutor(cores()) as pool:
            jobs = ((self.sizes, number) for number in range(self.sizes.photos))
            for number, photo in enumerate(pool.map(make_photo, jobs, chunksize=16)):
                (folder / f"{number % CLASSES}" / f"{number:06d}.jpg").write_bytes(photo)

    def _write_series(self, folder: Path) -> None:
        random = np.random.default_rng(self.sizes.seed)
        for number in range(self.sizes.series):
            values = random.standard_normal((self.sizes.steps, self.sizes.channels), dtype=np.float32)
            np.save(folder / f"{number:06d}.npy", values.cumsum(axis=0, dtype=np.float32))

    def _shard_photos(self, folder: Path) -> None:
        with ShardWriter(str(folder), samples_per_shard=-(-self.sizes.photos // self.sizes.shards)) as writer:
            for path in photo_paths(self.path("photos", "files")):
                writer.write(path.stem, {"jpg": path.read_bytes(), "cls": path.parent.name.encode()})

    def _shard_series(self, folder: Path) -> None:
        with ShardWriter(str(folder), samples_per_shard=-(-self.sizes.series // self.sizes.shards)) as writer:
            for path in sorted(self.path("series", "files").iterdir()):
                writer.write(path.stem, {"npy": path.read_bytes()})

    def _shard_small(self, folder: Path) -> None:
        with ShardWriter(str(folder), samples_per_shard=self.sizes.small // self.sizes.small_shards) as writer:
            for number, data in enumerate(small_samples(self.sizes.small, self.sizes.small_bytes, self.sizes.seed)):
                writer.write(f"{number:08d}", {"bin": data})


def photo_paths(folder: Path) -> list[Path]:
    """Every photograph of a folder of classes, in the order of their numbers."""
    return sorted(folder.glob("*/*.jpg"), key=lambda path: path.stem)


def small_samples(count: int, size: int, seed: int) -> Iterator[bytes]:
    """``count`` samples of ``size`` random bytes, each of which begins with its own number (8 bytes, little-endian)."""
    random = np.random.default_rng(seed)
    for number in range(count):
        yield number.to_bytes(8, "little") + random.bytes(size - 8)


def make_photo(job: tuple[Sizes, int]) -> bytes:
    """A JPEG of smooth noise at several scales, which is as large as a photograph's and takes as long to decode."""
    import simplejpeg
    from PIL import Image

    sizes, number = job
    random = np.random.default_rng((sizes.seed, number))
    picture = np.full((sizes.height, sizes.width, 3), 128.0, np.float32)
    for cells, deviation in (*SCALES, (FINEST, random.uniform(*FINEST_DEVIATION))):
        noise = random.normal(0, deviation, (max(2, cells * 3 // 4), cells, 3)).astype(np.float32)
        noise = 0.35 * noise + 1.2 * noise.mean(axis=2, keepdims=True)  # colours of a photograph go together
        for channel in range(3):
            plane = Image.fromarray(np.ascontiguousarray(noise[..., channel]))
            picture[..., channel] += np.asarray(plane.resize((sizes.width, sizes.height), Image.Resampling.BICUBIC))
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=sizes.quality, colorsubsampling="420", fastdct=False)
    return encoded


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
