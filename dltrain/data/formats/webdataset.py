"""Our shards, stores and samples in a pipeline of the library webdataset, for those who have one.

``ShardList`` and ``shard_samples`` take the place of its ``SimpleShardList`` and ``tarfile_to_samples``: shards come
through our stores, with their retries and parallel reads, and every member is compared with its checksum.

    pipeline = wds.DataPipeline(ShardList("s3://bucket/digits"), wds.split_by_worker, shard_samples, wds.decode("rgb"))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

import google_crc32c

from dltrain import storage
from dltrain.data.formats.compression import open_stream
from dltrain.data.formats.tar import read_samples
from dltrain.data.index import ShardIndex
from dltrain.data.manifest import load_manifest
from dltrain.data.sample import Sample
from dltrain.errors import UserError

SCHEMES = ("s3", "memory")


class ShardList:
    """The shards of a data set and their indexes, as the first stage of a pipeline."""

    def __init__(self, url: str) -> None:
        manifest = load_manifest(url)
        places = range(len(manifest.shards))
        self._shards = [{"url": manifest.shard_url(place), "index": manifest.index_url(place)} for place in places]

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (dict(shard) for shard in self._shards)

    def __call__(self) -> Iterator[dict[str, str]]:
        """How a pipeline asks its first stage for what it has."""
        return iter(self)


def shard_samples(shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Samples as webdataset has them; checked where an ``index`` is named beside the ``url``.

    Raises :class:`UserError` for a shard that is damaged or cut short.
    """
    for shard in shards:
        url = shard["url"]
        index = ShardIndex.from_bytes(storage.read(shard["index"])) if "index" in shard else None
        with open_stream(url) as file:
            for place, (key, fields) in enumerate(read_samples(file, url)):
                if index is not None:
                    _check(index, place, key, fields, url)
                yield {"__key__": key, "__url__": url, **fields}


def as_webdataset(samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """Samples of a :class:`~dltrain.data.reader.Dataset` as webdataset has them."""
    for sample in samples:
        yield {"__key__": sample.key, "__url__": sample.shard, **sample.fields}


def register_stores() -> None:
    """Let webdataset itself open ``s3://`` and ``memory://`` URLs, to read and to write, through our stores."""
    from webdataset.gopen import gopen_schemes  # imports torch

    gopen_schemes.update(dict.fromkeys(SCHEMES, _open))


def _open(url: str, mode: str = "rb", bufsize: int = 8192, **others: Any) -> BinaryIO:
    return storage.open_object(url) if mode == "rb" else _Upload(url)  # type: ignore[return-value]


class _Upload:
    """A local file that becomes the object when it is closed."""

    def __init__(self, url: str) -> None:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(storage.create(url))
        self.write, self.tell, self.flush = self._file.write, self._file.tell, self._file.flush

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> _Upload:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _check(index: ShardIndex, place: int, key: str, fields: dict[str, bytes], url: str) -> None:
    stored = {name: crc32c for name, _, _, crc32c in index.members(place)} if place < len(index) else {}
    for name, data in fields.items():
        if stored.get(name) != google_crc32c.value(data):
            raise UserError(f"field {name!r} of sample {key!r} in {url} is not as its index says; write the shard anew")
