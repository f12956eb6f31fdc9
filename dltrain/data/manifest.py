"""The list of a data set's shards: ``manifest.json`` beside them.

It holds what must be known before any shard is opened: samples, sizes and checksums of each shard and of its index,
and facts of the data (class names, scales). The fingerprint tells whether two runs saw the same data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dltrain import storage
from dltrain.errors import UserError
from dltrain.storage.base import ObjectNotFound

NAME = "manifest.json"
VERSION = 1


class NoManifest(UserError):
    """There are no shards at the URL, or none that have been indexed."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard and its index; sizes in bytes, checksums crc32c.

    ``format`` is the shard's: tar, tfrecord or recordio. ``url`` is where a shard lies that is not beside the manifest.
    """

    name: str
    samples: int
    bytes: int
    crc32c: int
    index: str
    index_bytes: int
    index_crc32c: int
    format: str = "tar"
    url: str = ""


@dataclass(frozen=True)
class Manifest:
    """All shards of a data set in order, and facts of the data."""

    url: str
    shards: tuple[ShardInfo, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shards' names, samples, sizes and checksums."""
        text = json.dumps([[s.name, s.samples, s.bytes, s.crc32c] for s in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def shard_url(self, shard: int) -> str:
        """Beside the manifest, or where its line says: shards may lie where one may not write."""
        info = self.shards[shard]
        return info.url or storage.join(self.url, info.name)

    def index_url(self, shard: int) -> str:
        return storage.join(self.url, self.shards[shard].index)

    def save(self) -> None:
        """Write ``manifest.json``, last of all, so that a data set without one is unfinished."""
        tree = {"version": VERSION, "facts": self.facts, "shards": [_line(shard) for shard in self.shards]}
        storage.write(storage.join(self.url, NAME), (json.dumps(tree, indent=1) + "\n").encode())


def _line(shard: ShardInfo) -> dict[str, Any]:
    """A shard's line, without what is as usual."""
    usual = {"format": "tar", "url": ""}
    return {name: value for name, value in asdict(shard).items() if usual.get(name) != value}


def load_manifest(url: str) -> Manifest:
    """Read the manifest of the data set at ``url``. Raises :class:`UserError` when it is absent, broken or empty."""
    try:
        text = storage.read(storage.join(url, NAME))
    except ObjectNotFound:
        raise NoManifest(
            f"there is no data set at {url}: {storage.join(url, NAME)} does not exist; "
            "check the URL, or index existing tars with: dltrain shards index " + url
        ) from None
    manifest = _parse(url, bytes(text))
    if not manifest.samples:
        raise UserError(f"the data set at {url} is empty: its manifest lists {len(manifest.shards)} shards, no samples")
    return manifest


def _parse(url: str, text: bytes) -> Manifest:
    place = storage.join(url, NAME)
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error}); index the data set anew: dltrain shards index {url}") from None
    if isinstance(tree, dict) and type(tree.get("version")) is int and tree["version"] != VERSION:
        raise UserError(f"{place} has version {tree['version']}; this dltrain reads version {VERSION}")
    if not isinstance(tree, dict) or tree.get("version") != VERSION or not isinstance(tree.get("facts"), dict):
        raise UserError(
            f"{place} is JSON, but not a list of shards as dltrain writes it (version, facts, shards); give the URL of "
            f"a data set, or index the tars that lie there: dltrain shards index {url}"
        )
    try:
        shards = tuple(_shard_info(**line) for line in tree["shards"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"a line of {place} does not describe a shard; index the data set anew: dltrain shards index {url}"
        ) from None
    return Manifest(url, shards, tree["facts"])


def _shard_info(**line: Any) -> ShardInfo:
    """A shard's line. Raises ``TypeError`` or ``ValueError`` for one that is none."""
    info = ShardInfo(**line)
    for entry in fields(ShardInfo):
        value = getattr(info, entry.name)
        if type(value) is not {"str": str, "int": int}[str(entry.type)]:
            raise TypeError(entry.name)
        if isinstance(value, int) and value < 0:
            raise ValueError(entry.name)
    return info


def known_facts(url: str) -> dict[str, Any]:
    """The facts of the data set at ``url``, or none where there is no sound manifest to take them from."""
    try:
        return load_manifest(url).facts
    except UserError:  # a folder of somebody else's tars has none, and a broken one is about to be written anew
        return {}
