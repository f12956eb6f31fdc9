"""What a data set holds, as lines to look at."""

from __future__ import annotations

from collections.abc import Iterator

from dltrain.data.dataset import Cache, open_reader
from dltrain.data.manifest import Manifest


def shard_lines(manifest: Manifest) -> Iterator[str]:
    """A line per shard: its name, or where it lies if that is elsewhere, samples, bytes and checksum."""
    for shard in manifest.shards:
        yield f"{shard.url or shard.name}  {shard.samples} samples  {shard.bytes} bytes  crc32c {shard.crc32c:08x}"


def sample_lines(manifest: Manifest) -> Iterator[str]:
    """A line per sample: its key, and the bytes of each field."""
    reader = open_reader(manifest.url, Cache(folder="off"))
    for shard in range(len(manifest.shards)):
        index = reader.index(shard)
        for sample in range(len(index)):
            members = "  ".join(f"{field} {size}" for field, _, size, _ in index.members(sample))
            yield f"{index.key(sample)}  {members}"
