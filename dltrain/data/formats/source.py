"""Where samples come from when shards are built: files to read through, or a data set to read by place.

A source says before anything is read into which pieces it falls, so that a plan of shards can be made of it which does
not depend on how many processes work on it.

    source = FileSource(["a.tar", "b.tar"], read_tar)
    for key, fields in source.read(0, 2):
        ...
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.order import derive, permute
from dltrain.data.sample import Sample
from dltrain.errors import UserError

Keyed = tuple[str, dict[str, bytes]]
"""A sample: its key, and bytes by field."""

_MOST_AT_ONCE, _BYTES_AT_ONCE = 1024, 32 << 20
"""Samples read together: enough for a store's requests to run in parallel."""

_EXTENSIONS = re.compile(r"(\.[A-Za-z][A-Za-z0-9]*)+$")


class Source(Protocol):
    """Samples in one order, in pieces that can be begun with."""

    counted: bool
    """Whether every piece is one sample."""

    @property
    def identity(self) -> str:
        """Differs where the samples or their order would."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest shall say of the data."""
        ...

    def sizes(self) -> NDArray[np.int64]:
        """About how many bytes each piece has, [pieces]."""
        ...

    def read(self, start: int, stop: int, skip: int = 0) -> Iterator[Keyed]:
        """The samples of pieces ``[start, stop)`` without the first ``skip``. Raises :class:`UserError`."""
        ...


class FileSource:
    """Files that are read through, each by ``read_file(url)``."""

    counted = False

    def __init__(
        self,
        files: Sequence[str],
        read_file: Callable[[str], Iterator[Keyed]],
        facts: dict[str, Any] | None = None,
        settings: Any = None,
    ) -> None:
        self.files, self._read_file, self.facts = tuple(files), read_file, facts or {}
        with ThreadPoolExecutor(16) as pool:
            self._objects = list(pool.map(storage.stat, self.files))
        self._settings = settings

    @property
    def identity(self) -> str:
        tags = [(url, info.size, info.etag) for url, info in zip(self.files, self._objects, strict=True)]
        return _digest([tags, repr(self._settings)])

    def sizes(self) -> NDArray[np.int64]:
        return np.array([info.size for info in self._objects], dtype=np.int64)

    def read(self, start: int, stop: int, skip: int = 0) -> Iterator[Keyed]:
        return islice(chain.from_iterable(map(self._read_file, self.files[start:stop])), skip, None)


class Placed(Protocol):
    """The part of a data set that a source needs."""

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def read(self, shards: NDArray[np.int64], indices: NDArray[np.int64]) -> list[Sample]: ...


class DatasetSource:
    """A data set, sample by sample: in its own order, or shuffled as a whole by ``seed``."""

    counted = True

    def __init__(self, dataset: Placed, bytes_per_sample: int, seed: int | None = None) -> None:
        self._dataset, self._bytes, self._seed = dataset, bytes_per_sample, seed
        self._ends = np.cumsum(dataset.shard_sizes, dtype=np.int64)

    @property
    def identity(self) -> str:
        return _digest([self._dataset.fingerprint, self._seed])

    @property
    def facts(self) -> dict[str, Any]:
        return self._dataset.facts

    def sizes(self) -> NDArray[np.int64]:
        samples = int(self._ends[-1]) if len(self._ends) else 0
        return np.broadcast_to(np.int64(max(1, self._bytes)), samples)

    def read(self, start: int, stop: int, skip: int = 0) -> Iterator[Keyed]:
        step = min(_MOST_AT_ONCE, max(1, _BYTES_AT_ONCE // max(1, self._bytes)))
        for first in range(start + skip, stop, step):
            places = np.arange(first, min(first + step, stop), dtype=np.int64)
            for sample in self._dataset.read(*self._locate(places)):
                yield sample.key, {name: bytes(data) for name, data in sample.fields.items()}

    def _locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._seed is not None:
            places = permute(places, self._ends[-1:], np.array(derive(self._seed), dtype=np.uint64))
        shards = np.searchsorted(self._ends, places, side="right")
        return shards, places - np.where(shards > 0, self._ends[shards - 1], 0)


def folder_url(url: str) -> str:
    """The URL as listings begin: without a slash at its end, and a path of this host in its plain form."""
    path = storage.local_path(url)
    if path is None:
        return url.rstrip("/")
    return f"file://{path}" if url.startswith("file://") else str(path)


def is_object(url: str) -> bool:
    """Whether the URL names one object, not a folder or a bucket."""
    scheme, _, path = url.partition("://")
    return not url.endswith("/") and (scheme != "s3" or "/" in path) and storage.exists(url)


def find_files(url: str, accept: Callable[[str], bool], what: str) -> list[str]:
    """The object at ``url``, or those below it whose names are accepted. Raises :class:`UserError` for none."""
    if is_object(url):
        return [url]
    folder = folder_url(url)
    files = [name for name in storage.listing(folder) if accept(name) and "/." not in name.removeprefix(folder)]
    if not files:
        raise UserError(f"there are no {what} at {url}; check the URL")
    return files


def inside(url: str, folder: str) -> str:
    """The name of an object below ``folder``; its own name where it lies elsewhere."""
    begin = f"{folder_url(folder)}/"
    return url.removeprefix(begin) if url.startswith(begin) else url.rpartition("/")[2]


def stem(name: str) -> str:
    """A file's name without its extensions, to begin keys with; dots in it become hyphens."""
    path, slash, base = name.rpartition("/")
    return f"{path}{slash}{_EXTENSIONS.sub('', base).replace('.', '-')}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
