"""A channel shared out over the hosts (``ShardedByS3Key``): every host holds other shards of one data set.

SageMaker deals out objects, not data sets: a shard, its index and the manifest may lie on three hosts. So the hosts
tell one another what they hold; the manifest comes from whoever has it (or from a channel ``<name>-index``), and an
index that lies elsewhere is made anew from its tar.

Each host then walks its own shards in an order of its own, and all take turns: position p is host p mod K's. An epoch
ends when the host with the fewest samples has given all of its own; the others leave some out, other ones in every
epoch. So all ranks make equal steps with equal batches, and no sample comes twice in an epoch. Sharing by size instead
would bring every sample into every epoch, in the same time: the fullest host sets the pace either way.

    part = open_part(channel, channels, environment, gather, scratch)
    order = PartOrder(Order(dataset.shard_sizes), counts=(5000, 4800), node=0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from dltrain import storage
from dltrain.data.building.indexing import scan_shard
from dltrain.data.manifest import NAME, Manifest, ShardInfo, load_manifest
from dltrain.data.order import Integers, Order, fields_of
from dltrain.data.writer import publish_index
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment
from dltrain.sagemaker.channels import INDEX, Channel, Channels

Gather = Callable[[Any], list[Any]]
"""A collective: every rank's value, in the order of the ranks."""


def open_part(
    channel: Channel, channels: Channels, environment: Environment, gather: Gather, scratch: Path
) -> Manifest:
    """This host's part of a channel's data set; called by all ranks together.

    Manifest and indexes of the part lie in ``scratch`` afterwards, a folder that the ranks of a host share. Raises
    :class:`UserError`, on every rank, when there is no manifest, a shard is on no host or on two, or a host has none.
    """
    places = [channels[name].folder for name in (channel.name + INDEX, channel.name) if name in channels]
    whole = _manifest_of_all(channel, places, gather)
    failure, names = "", list[str]()
    if environment.local_rank == 0:
        try:
            part = with_indexes(local_part(whole, channel.folder), places, scratch)
            part.save()
            names = [shard.name for shard in part.shards]
        except UserError as error:
            failure = f"host {environment.node}: {error}"
    for answer in gather(failure):
        if answer:
            raise UserError(answer)
    _refuse_gaps(whole, channel, gather(names))
    return load_manifest(str(scratch))


def local_part(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest's lines whose shard lies in ``folder``, with the place of each.

    Raises :class:`UserError` for a shard of another size than its line says, and where there is none.
    """
    mine = []
    for shard in manifest.shards:
        file = folder / shard.name
        if not file.is_file():
            continue
        if file.stat().st_size != shard.bytes:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes where its manifest says {shard.bytes}; "
                "give the channel the data set that its manifest describes"
            )
        mine.append(replace(shard, url=str(file)))
    if not sum(shard.samples for shard in mine):
        raise UserError(
            f"none of the {len(manifest.shards)} shards of the data set lies in {folder}; train on fewer hosts, keep "
            "the indexes under another prefix than the shards (dltrain shards index URL --at URL), or make the channel "
            "FullyReplicated"
        )
    return Manifest(manifest.url, tuple(mine), manifest.facts)


def with_indexes(part: Manifest, places: Sequence[Path], scratch: Path) -> Manifest:
    """The same with all its indexes in ``scratch``: copied from the first of ``places`` that has one, or made anew."""
    return Manifest(str(scratch), tuple(_indexed(shard, places, scratch) for shard in part.shards), part.facts)


def _indexed(shard: ShardInfo, places: Sequence[Path], scratch: Path) -> ShardInfo:
    file = next((place / shard.index for place in places if (place / shard.index).is_file()), None)
    if file is not None:
        storage.write(str(scratch / shard.index), file.read_bytes())
        return shard
    scan = scan_shard(shard.url, shard.name, shard.format)
    if scan.crc32c != shard.crc32c:
        raise UserError(f"{shard.url} is damaged: its checksum is not the manifest's; write it anew")
    return publish_index(str(scratch), shard.name, scan, shard.url, shard.format)


def _manifest_of_all(channel: Channel, places: Sequence[Path], gather: Gather) -> Manifest:
    """The one manifest; sent around only where a host has none."""
    mine = next(((place / NAME).read_bytes() for place in places if (place / NAME).is_file()), b"")
    tags = gather(google_crc32c.value(mine) if mine else None)
    known = [rank for rank, tag in enumerate(tags) if tag is not None]
    if not known:
        raise UserError(
            f"no host has a {NAME} in channel {channel.name!r}; give it to all of them in a FullyReplicated channel "
            f"{channel.name + INDEX!r}, with the indexes (.idx) of the shards"
        )
    if len({tags[rank] for rank in known}) > 1:
        raise UserError(f"the hosts have different manifests in channel {channel.name!r}; it must hold one data set")
    if len(known) < len(tags):
        mine = next(text for text in gather(mine) if text)
    url = f"memory://sagemaker/{channel.name}"
    storage.write(storage.join(url, NAME), mine)
    return load_manifest(url)


def _refuse_gaps(whole: Manifest, channel: Channel, names: Sequence[Sequence[str]]) -> None:
    """Every shard must lie on one host."""
    held = Counter(name for of_rank in names for name in of_rank)
    missing = [shard.name for shard in whole.shards if not held[shard.name]]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(whole.shards)} shards of channel {channel.name!r} are on no host (the first: "
            f"{missing[0]}); the channel must bring all that its manifest lists"
        )
    twice = next((name for name, hosts in held.items() if hosts > 1), None)
    if twice is not None:
        raise UserError(
            f"{twice} of channel {channel.name!r} is on {held[twice]} hosts, though the channel is ShardedByS3Key; "
            "make it FullyReplicated, and all hosts share one order"
        )


@dataclass(frozen=True)
class PartOrder:
    """The sequence of all hosts' samples, as host ``node`` sees it; ``counts`` are the samples of each host.

    Position p of an epoch is the next sample of host p mod K in its own order. A position of another host stands here
    for this host's sample of the same turn, which is what fills up a batch with weight 0.
    """

    local: Order
    counts: tuple[int, ...]
    node: int

    @property
    def seed(self) -> int:
        return self.local.seed

    @property
    def lanes(self) -> int:
        """Places between two neighbours of one lane of one host."""
        return self.local.lanes * len(self.counts)

    @property
    def tails(self) -> tuple[str, ...]:
        return self.local.tails

    @cached_property
    def samples(self) -> int:
        """Of an epoch: as many of every host as the smallest has."""
        return len(self.counts) * min(self.counts)

    @property
    def left_out(self) -> int:
        """Samples of all hosts that an epoch does without."""
        return sum(self.counts) - self.samples

    def locate(self, positions: Integers) -> tuple[Integers, Integers]:
        """Shard of this host, and index within it, of the samples at ``positions``, int64 [n]."""
        epoch, place = np.divmod(positions, self.samples)
        return self.local.locate(epoch * self.local.samples + place // len(self.counts))

    def state(self) -> dict[str, Any]:
        """What a cursor must find unchanged."""
        return {**self.local.state(), "samples": self.samples, "hosts": len(self.counts)}

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)
