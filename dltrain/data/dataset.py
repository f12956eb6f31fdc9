"""Opening a data set by its URL.

dataset = open_dataset("s3://bucket/digits/train", cache=Cache(folder="/fast/shards"))
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dltrain import storage
from dltrain.data.bundled import materialise
from dltrain.data.cache import NodeCache
from dltrain.data.cached import CachedFiles
from dltrain.data.files import LocalFiles, RangedFiles, ShardFiles
from dltrain.data.manifest import Manifest, NoManifest, load_manifest
from dltrain.data.prefetch import Depth
from dltrain.data.reader import Dataset, ShardDataset, ShardReader
from dltrain.data.windows import Window, WindowDataset
from dltrain.errors import UserError

OFF = "off"


@dataclass(frozen=True)
class Cache:
    """Where a node keeps copies of remote shards, how many bytes of them, and how far ahead they are fetched.

    ``folder`` is empty for one under the temporary folder, or ``off``; 0 ``bytes`` are three quarters of the free disk.
    """

    folder: str = ""
    bytes: int = 0
    depth: Depth = field(default_factory=Depth)

    def open(self) -> NodeCache:
        """The cache, shared with all processes of the node that name the same folder."""
        return NodeCache(Path(self.folder).expanduser() if self.folder else default_folder(), self.bytes)


def default_folder() -> Path:
    """Below ``$DLTRAIN_CACHE``, or the temporary folder: on a disk of this node."""
    base = os.environ.get("DLTRAIN_CACHE")
    return (Path(base).expanduser() if base else Path(tempfile.gettempdir()) / f"dltrain-{os.getuid()}") / "shards"


def open_dataset(url: str, window: Window | None = None, cache: Cache | None = None) -> Dataset:
    """The data set at ``url``: of windows where ``window`` is given, of whole samples otherwise.

    Shards have a ``manifest.json``; without one, Parquet files, a folder of images for each class, and a Ground Truth
    manifest are read as they lie. Raises :class:`UserError` where there is nothing to read.
    """
    try:
        reader = open_reader(url, cache)
    except NoManifest:
        found = _as_it_lies(url) if window is None else None
        if found is None:
            raise
        return found
    return ShardDataset(reader) if window is None else WindowDataset(reader, window)


def open_reader(url: str, cache: Cache | None = None) -> ShardReader:
    """A reader of the shards at ``url``. Raises :class:`NoManifest` when there are none."""
    manifest = load_manifest(materialise(url))
    return ShardReader(manifest, open_files(manifest, cache or Cache()))


def _as_it_lies(url: str) -> Dataset | None:
    from dltrain.data.formats.opening import DIRECT, guess  # each of the formats is a room of its own

    try:
        kind = guess(url)
    except UserError:
        return None  # the sentence about the missing manifest says more
    return DIRECT[kind](url) if kind in DIRECT else None


def open_files(manifest: Manifest, cache: Cache) -> ShardFiles:
    """The shards' bytes: straight from this host's disk, or through a cache on it."""
    first = manifest.shard_url(0)
    if storage.local_path(first) is not None:
        return LocalFiles(manifest)
    if cache.folder == OFF or not storage.is_remote(first):
        return RangedFiles(manifest)
    return CachedFiles(manifest, cache.open(), cache.depth)
