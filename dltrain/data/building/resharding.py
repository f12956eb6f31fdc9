"""A data set as the source of another: the same samples in shards of another size, or in another order."""

from __future__ import annotations

from dltrain.data.dataset import Cache, open_reader
from dltrain.data.formats.source import DatasetSource
from dltrain.data.reader import ShardDataset
from dltrain.errors import UserError


def open_reshard(url: str, seed: int | None = None) -> DatasetSource:
    """The samples of the data set at ``url``, shuffled as a whole where there is a ``seed``."""
    reader = open_reader(url, Cache(folder="off"))
    others = sorted({shard.format for shard in reader.manifest.shards} - {"tar"})
    if others:
        raise UserError(f"{url} is an index of {others[0]} files; make tars of them with: dltrain shards convert")
    size = sum(shard.bytes for shard in reader.manifest.shards)
    return DatasetSource(ShardDataset(reader), size // max(1, reader.manifest.samples), seed)
