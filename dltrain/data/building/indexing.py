"""Indexing shards that others wrote, where they lie: webdataset's tars, TFRecord and RecordIO files.

manifest = index_shards("s3://public/imagenet", at="s3://mine/imagenet-index", workers=8)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dltrain import storage
from dltrain.data.building.jobs import Report, Watch, run_jobs
from dltrain.data.building.ledger import Ledger
from dltrain.data.formats import records, tar
from dltrain.data.formats.compression import open_addressable
from dltrain.data.formats.opening import kind_of
from dltrain.data.formats.source import folder_url, inside, stem
from dltrain.data.formats.tape import Scan
from dltrain.data.manifest import NAME, Manifest, ShardInfo, known_facts, load_manifest
from dltrain.data.writer import publish_index
from dltrain.errors import UserError

INDEXED = ("tar", "tfrecord", "recordio")


def index_shards(url: str, at: str = "", workers: int = 1, watch: Watch | None = None) -> Manifest:
    """Read every shard below ``url`` once, and write its index and the manifest beside it, or at ``at``.

    Facts of a manifest that was there are kept. Raises :class:`UserError` for a shard that is compressed or damaged.
    """
    folder, target = folder_url(url), folder_url(at or url)
    names = [inside(name, folder) for name in storage.listing(folder) if kind_of(name) in INDEXED]
    if not names:
        raise UserError(f"there are no tars, TFRecord or RecordIO files at {url}")
    if target != folder:
        _refuse_shards(target)
    ledger = Ledger(target, f"index of {_absolute(folder)}")
    ledger.begin()
    shards = run_jobs(_Indexing(folder, target, tuple(names), ledger), range(len(names)), workers, watch)
    if not sum(shard.samples for shard in shards):
        raise UserError(f"the {len(shards)} files at {url} hold no samples")
    manifest = Manifest(target, tuple(shards), known_facts(target) or known_facts(folder))
    manifest.save()
    ledger.clear()
    return manifest


@dataclass(frozen=True)
class _Indexing:
    folder: str
    target: str
    names: tuple[str, ...]
    ledger: Ledger

    def __call__(self, number: int, report: Report) -> ShardInfo:
        name = self.names[number]
        url = storage.join(self.folder, name)
        tag = _tag(url, name)
        shards, finished = self.ledger.load(number, tag)
        if not finished:
            elsewhere = _absolute(url) if self.target != self.folder else ""
            shards = [publish_index(self.target, name, scan_shard(url, name), elsewhere, kind_of(name))]
            self.ledger.save(number, shards, finished=True, tag=tag)
        report(shards[0].samples, shards[0].bytes)
        return shards[0]


def scan_shard(url: str, name: str, format: str = "") -> Scan:
    """Index one shard in one pass; records get keys that begin with ``name``. Raises :class:`UserError`."""
    format = format or kind_of(name)
    with open_addressable(url) as file:
        return tar.scan(file, url) if format == "tar" else records.scan(file, url, format, stem(name))


def _tag(url: str, name: str) -> str:
    """What changes with a file: on this host, its time too."""
    info, path = storage.stat(url), storage.local_path(url)
    return f"{name} {info.size} {info.etag or (path.stat().st_mtime_ns if path else '')}"


def _refuse_shards(target: str) -> None:
    """An index over others' shards does not take the place of a data set that has its own."""
    if not storage.exists(storage.join(target, NAME)):
        return
    manifest = load_manifest(target)
    if not all(shard.url for shard in manifest.shards):
        raise UserError(f"at {target} lies a data set with shards of its own; name another place with --at")


def _absolute(url: str) -> str:
    path = storage.local_path(url)
    return url if path is None else str(Path(path).absolute())
