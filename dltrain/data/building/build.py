"""Building a data set from a source, by several processes, in shards that do not depend on how many.

The source is cut into parts before anything is read; a part is some shards' worth of samples, and one process makes
all its shards. A shard appears whole, with its index; after an interruption the same command keeps those that are
there.

    manifest = build_shards(open_source("/data/flowers"), "s3://bucket/flowers", workers=4)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dltrain.data.building.jobs import Report, Watch, refuse_workers, run_jobs
from dltrain.data.building.ledger import Ledger
from dltrain.data.formats.source import Source
from dltrain.data.manifest import Manifest, ShardInfo
from dltrain.data.writer import Limits, Packer, refuse_existing
from dltrain.errors import UserError

SHARDS_PER_PART = 4
"""So many shards are one part's, about: the last of them is smaller, so one of four at most."""


@dataclass(frozen=True)
class Part:
    """Pieces ``[start, stop)`` of the source."""

    number: int
    start: int
    stop: int


def build_shards(
    source: Source, url: str, *, limits: Limits | None = None, workers: int = 1, watch: Watch | None = None
) -> Manifest:
    """Write all samples of ``source`` as the data set ``url``; the manifest comes last.

    Raises :class:`UserError` for a source without samples, and where another data set lies or is being built.
    """
    limits = limits or Limits()
    refuse_workers(workers)
    refuse_existing(url)
    parts = plan_parts(source, limits)
    ledger = Ledger(url, _identity(source, limits))
    ledger.begin()
    done = run_jobs(_Building(source, url, limits, ledger), parts, workers, watch)
    manifest = Manifest(url, tuple(shard for shards in done for shard in shards), source.facts)
    if not manifest.shards:
        ledger.clear()
        raise UserError(f"there are no samples to write to {url}: what was to be read holds none")
    manifest.save()
    ledger.clear()
    return manifest


def plan_parts(source: Source, limits: Limits) -> list[Part]:
    """The source cut into parts, by its sizes and the limits alone."""
    sizes = source.sizes()
    ends = list(_equal_ends(sizes, limits) if source.counted else _grouped_ends(sizes, limits))
    return [Part(number, start, stop) for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False))]


def _equal_ends(sizes: NDArray[np.int64], limits: Limits) -> Iterator[int]:
    """Parts of equally many samples: where a shard's number is given, a multiple of it."""
    mean = float(sizes.mean()) if len(sizes) else 1.0
    per_shard = max(1, int(limits.bytes // max(1.0, mean)))
    per_part = SHARDS_PER_PART * min(per_shard, limits.samples or per_shard)
    if limits.samples:
        per_part = max(1, per_part // limits.samples) * limits.samples
    yield from range(per_part, len(sizes), per_part)
    if len(sizes):
        yield len(sizes)


def _grouped_ends(sizes: NDArray[np.int64], limits: Limits) -> Iterator[int]:
    """Parts of neighbouring files, as many as make some shards; a larger file is a part alone."""
    collected = 0
    for place, size in enumerate(sizes.tolist()):
        if collected and collected + size > SHARDS_PER_PART * limits.bytes:
            yield place
            collected = 0
        collected += size
    if len(sizes):
        yield len(sizes)


@dataclass(frozen=True)
class _Building:
    """What a process needs to make the shards of a part."""

    source: Source
    url: str
    limits: Limits
    ledger: Ledger

    def __call__(self, part: Part, report: Report) -> list[ShardInfo]:
        shards, finished = self.ledger.load(part.number)
        for shard in shards:
            report(shard.samples, shard.bytes)
        if finished:
            return shards
        name = f"shard-{part.number:05d}-{{:03d}}.tar"
        packer = Packer(self.url, name, self.limits, first=len(shards))
        try:
            for key, fields in self.source.read(part.start, part.stop, sum(shard.samples for shard in shards)):
                full = packer.write(key, fields)
                if full:
                    shards.append(full)
                    self.ledger.save(part.number, shards, finished=False)
                report(1, sum(map(len, fields.values())))
        except BaseException as error:
            packer.discard(error)
            raise
        last = packer.finish()
        shards += [last] if last else []
        self.ledger.save(part.number, shards, finished=True)
        return shards


def _identity(source: Source, limits: Limits) -> str:
    return hashlib.sha256(f"{source.identity} {limits}".encode()).hexdigest()[:16]
