"""What an interrupted work on shards has done, so that the same command goes on with it.

Beside the shards lie ``.building.json``, which says what is being made, and a record of finished shards for every part
of the work; all are removed when the manifest is there.

    ledger = Ledger(url, identity)
    ledger.begin()
    shards, finished = ledger.load(part)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dltrain import storage
from dltrain.data.formats.source import folder_url, inside
from dltrain.data.manifest import ShardInfo
from dltrain.errors import UserError
from dltrain.storage.base import ObjectNotFound

_LEFT = re.compile(r"\.(building[^/]*\.json|[^/]+\.(tar|idx|json)\.\w{8})$")
"""Names of records, and of files on their way to their own name; none in a folder inside, which has its own."""


@dataclass(frozen=True)
class Ledger:
    """Records below ``url`` of the work that ``identity`` tells from every other."""

    url: str
    identity: str

    def begin(self) -> None:
        """Note what is being made. Raises :class:`UserError` where something else was begun."""
        begun = _read(self._name())
        if begun is None:
            storage.write(self._name(), json.dumps({"identity": self.identity}).encode())
        elif begun.get("identity") != self.identity:
            raise UserError(
                f"at {self.url} lies unfinished work on other samples, or with other limits; "
                "run that command again to finish it, or remove what is there"
            )

    def load(self, part: int, tag: str = "") -> tuple[list[ShardInfo], bool]:
        """The shards of a part that are there in full, and whether they are all of it; none saved under another tag."""
        record = _read(self._name(part))
        if record is None or record["tag"] != tag:
            return [], False
        shards = [ShardInfo(**shard) for shard in record["shards"]]
        whole = next((place for place, shard in enumerate(shards) if not self._is_there(shard)), len(shards))
        return shards[:whole], record["finished"] and whole == len(shards)

    def save(self, part: int, shards: Sequence[ShardInfo], finished: bool, tag: str = "") -> None:
        """Record the shards of a part that are done; ``tag`` changes with what they are made of."""
        record = {"tag": tag, "shards": [asdict(shard) for shard in shards], "finished": finished}
        storage.write(self._name(part), json.dumps(record).encode())

    def clear(self) -> None:
        """Remove all records, and the halves of files that an interruption may have left on this host's disk."""
        for url in storage.listing(folder_url(self.url)):
            if _LEFT.match(inside(url, self.url)):
                storage.delete(url)

    def _name(self, part: int | None = None) -> str:
        return storage.join(self.url, ".building.json" if part is None else f".building-{part:05d}.json")

    def _is_there(self, shard: ShardInfo) -> bool:
        """Whether shard and index have the bytes they should; a shard appears whole or not at all."""
        tar, index = shard.url or storage.join(self.url, shard.name), storage.join(self.url, shard.index)
        try:
            return (storage.size(tar), storage.size(index)) == (shard.bytes, shard.index_bytes)
        except ObjectNotFound:
            return False


def _read(url: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(bytes(storage.read(url))))
    except ObjectNotFound:
        return None
