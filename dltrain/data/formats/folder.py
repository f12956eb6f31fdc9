"""Folders of images, a class each: ``cat/0001.jpg`` is sample ``cat/0001`` of class ``cat``.

Classes are numbered in the order of their names, as torchvision's ``ImageFolder`` does. Samples stand in one fixed
order that mixes the classes, so that neighbours, which a shard keeps together, are not all of one class.

    dataset = FolderDataset("/data/flowers")
    print(dataset.facts["classes"])
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.formats.fields import key_of
from dltrain.data.formats.source import find_files, folder_url
from dltrain.data.sample import Sample
from dltrain.errors import UserError

EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp", "bmp": "bmp"}
SAMPLES_PER_SHARD = 256
"""Files that the order of data keeps together; there are no shards on the disk."""

_READS = 16
_SIZES_LOOKED_AT = 64


class FolderDataset:
    """A data set of the images below ``url``; each has the field of its extension (``jpg``, ``png``) and ``cls``."""

    def __init__(self, url: str) -> None:
        self._url = folder_url(url)
        files = find_files(self._url, lambda name: _extension(name) in EXTENSIONS, "images")
        self._names = sorted((file.removeprefix(self._url + "/") for file in files), key=_mixed)
        flat = next((name for name in self._names if "/" not in name), None)
        if flat is not None:
            raise UserError(f"{url} holds the image {flat} outside of any class; put each class in a folder of its own")
        classes = sorted({name.partition("/")[0] for name in self._names})
        self._number = {name: place for place, name in enumerate(classes)}
        self._check_keys()

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        full, rest = divmod(len(self._names), SAMPLES_PER_SHARD)
        return (SAMPLES_PER_SHARD,) * full + ((rest,) if rest else ())

    @property
    def fingerprint(self) -> str:
        """Of the files' names: an image replaced by another of its name goes unseen."""
        return hashlib.sha256(json.dumps(self._names).encode()).hexdigest()[:16]

    @property
    def facts(self) -> dict[str, Any]:
        return {"classes": list(self._number)}

    def read(self, shards: NDArray[np.int64], indices: NDArray[np.int64]) -> list[Sample]:
        names = [self._names[place] for place in (shards * SAMPLES_PER_SHARD + indices).tolist()]
        if not storage.is_remote(self._url):
            return [self._read(name) for name in names]
        with ThreadPoolExecutor(_READS) as pool:
            return list(pool.map(self._read, names))

    def bytes_per_sample(self) -> int:
        """The mean size of a few files spread over all of them."""
        places = np.linspace(0, len(self._names) - 1, min(len(self._names), _SIZES_LOOKED_AT)).astype(int)
        with ThreadPoolExecutor(_READS) as pool:
            sizes = list(pool.map(lambda place: storage.size(f"{self._url}/{self._names[place]}"), places.tolist()))
        return sum(sizes) // len(sizes)

    def _read(self, name: str) -> Sample:
        url = f"{self._url}/{name}"
        label = self._number[name.partition("/")[0]]
        fields = {EXTENSIONS[_extension(name)]: bytes(storage.read(url)), "cls": b"%d" % label}
        return Sample(_key(name), fields, url)

    def _check_keys(self) -> None:
        names: dict[str, str] = {}
        for name in self._names:
            other = names.setdefault(_key(name), name)
            if other != name:
                raise UserError(f"{self._url} holds {other} and {name}, which would be one sample; rename one of them")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _key(name: str) -> str:
    return key_of(name.rpartition(".")[0])


def _mixed(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
