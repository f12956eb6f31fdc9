"""``dltrain shards build NAME URL | ls URL | verify URL | index URL``"""

from __future__ import annotations

from collections.abc import Sequence

from dltrain import storage
from dltrain.cli.main import Parser
from dltrain.data.bundled import build
from dltrain.data.manifest import NAME, Manifest, load_manifest
from dltrain.data.reader import ShardReader
from dltrain.data.writer import publish_shard
from dltrain.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """Build a bundled data set, or look at one."""
    parser = Parser(prog="dltrain shards")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="write a bundled data set (digits, co2) as shards")
    make.add_argument("name")
    make.add_argument("url")
    for name, text in (
        ("ls", "list the shards of a data set"),
        ("verify", "read every byte and compare it with its checksum"),
        ("index", "index the webdataset tars of a folder: writes *.idx and the manifest beside them"),
    ):
        commands.add_parser(name, help=text).add_argument("url")
    known = parser.parse_args(arguments)
    if known.command == "build":
        for url in build(known.name, known.url):
            print(f"wrote {load_manifest(url).samples} samples to {url}")
    elif known.command == "ls":
        _list(load_manifest(known.url))
    elif known.command == "verify":
        _verify(load_manifest(known.url))
    else:
        _index(known.url)
    return 0


def _list(manifest: Manifest) -> None:
    for shard in manifest.shards:
        print(f"{shard.name}  {shard.samples} samples  {shard.bytes} bytes  crc32c {shard.crc32c:08x}")
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards, fingerprint {manifest.fingerprint}")


def _verify(manifest: Manifest) -> None:
    largest = max(shard.bytes for shard in manifest.shards)
    reader = ShardReader(manifest, largest)
    for shard in range(len(manifest.shards)):
        reader.index(shard)
        reader.read_part(shard, 0, 1)
        info = manifest.shards[shard]
        for name, expected in ((info.name, info.bytes), (info.index, info.index_bytes)):
            found = storage.size(storage.join(manifest.url, name))
            if found != expected:
                raise UserError(f"{storage.join(manifest.url, name)} has {found} bytes, its manifest says {expected}")
    print(f"{len(manifest.shards)} shards of {manifest.url} are whole: {manifest.samples} samples")


def _index(url: str) -> None:
    names = [name for name in storage.listing(url) if name.endswith(".tar")]
    if not names:
        raise UserError(f"there are no .tar files at {url}")
    shards = []
    for name in names:
        relative = name.removeprefix(url.rstrip("/") + "/")
        shards.append(publish_shard(url, relative, bytes(storage.read(name)), write_tar=False))
        print(f"indexed {relative}: {shards[-1].samples} samples")
    manifest = Manifest(url, tuple(shards))
    manifest.save()
    print(f"wrote {storage.join(url, NAME)}: {manifest.samples} samples in {len(shards)} shards")
