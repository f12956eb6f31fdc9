"""Reading every byte of a data set, and comparing it with what index and manifest say.

verify_shards("s3://bucket/digits/train", workers=4)
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.building.indexing import scan_shard
from dltrain.data.building.jobs import Report, Watch, run_jobs
from dltrain.data.formats.tape import Scan
from dltrain.data.index import ShardIndex, sample_names
from dltrain.data.manifest import Manifest, load_manifest
from dltrain.data.reader import parse_index
from dltrain.errors import UserError

KEYS_AT_ONCE = 1 << 25
"""Keys compared in one pass over the indexes, of which 8 bytes each are in memory."""


def verify_shards(url: str, workers: int = 1, watch: Watch | None = None) -> Manifest:
    """Raise :class:`UserError` naming the first shard, and the sample in it, that is not as it was written."""
    manifest = load_manifest(url)
    run_jobs(_Verifying(manifest), range(len(manifest.shards)), workers, watch)
    check_keys(manifest)
    return manifest


@dataclass(frozen=True)
class _Verifying:
    manifest: Manifest

    def __call__(self, shard: int, report: Report) -> None:
        info, url = self.manifest.shards[shard], self.manifest.shard_url(shard)
        stored = _read_index(self.manifest, shard)
        found = storage.size(url)
        if found != info.bytes:
            raise UserError(f"{url} has {found} bytes, its manifest says {info.bytes}; write the shard anew")
        scan = scan_shard(url, info.name, info.format)
        if scan.index.to_bytes() != stored.to_bytes():
            raise _difference(url, scan, stored)
        if scan.crc32c != info.crc32c:
            raise UserError(f"{url} differs from what its manifest says, outside of its members; write the shard anew")
        report(info.samples, info.bytes)


def _difference(url: str, scan: Scan, stored: ShardIndex) -> UserError:
    found = scan.index
    if len(found.offset) == len(stored.offset) and bool((found.offset == stored.offset).all()):
        for member in np.flatnonzero((found.crc32c != stored.crc32c) & (found.size == stored.size)).tolist():
            start, size = int(stored.offset[member]), int(stored.size[member])
            key = stored.key(int(np.searchsorted(stored.first, member, side="right")) - 1)
            field = stored.extensions[int(stored.extension[member])]
            return UserError(
                f"field {field!r} of sample {key!r} in {url} is damaged (bytes {start} to {start + size}); "
                "write the shard anew"
            )
    return UserError(f"{url} is not the shard that its index describes; write or index the data set anew")


def _read_index(manifest: Manifest, shard: int) -> ShardIndex:
    return parse_index(manifest, shard, storage.read(manifest.index_url(shard)))


def check_keys(manifest: Manifest, at_once: int = KEYS_AT_ONCE) -> None:
    """Raise :class:`UserError` where two samples have one key, in memory of about 16 x ``at_once`` bytes.

    Keys are compared by 64 bits of a hash; each pass over the indexes takes the hashes of one remainder.
    """
    passes = -(-manifest.samples // at_once)
    for remainder in range(passes):
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            parts = pool.map(lambda shard: _hashes(manifest, shard), range(len(manifest.shards)))
            hashes = np.sort(np.concatenate([part[part % passes == remainder] for part in parts]))
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(twice):
            _report_twice(manifest, int(twice[0]))


def _hashes(manifest: Manifest, shard: int) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(_hash, sample_names(_read_index(manifest, shard)))), np.uint64)


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _report_twice(manifest: Manifest, hash: int) -> None:
    """Find the key behind a hash that came twice. Two keys may share one: then there is nothing to tell."""
    found: dict[str, str] = {}
    for shard in range(len(manifest.shards)):
        for place in np.flatnonzero(_hashes(manifest, shard) == np.uint64(hash)).tolist():
            key, url = _read_index(manifest, shard).key(place), manifest.shard_url(shard)
            if key in found:
                raise UserError(f"sample {key!r} is in {found[key]} and in {url}; each sample needs a key of its own")
            found[key] = url
