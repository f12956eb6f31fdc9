"""``dltrain shards build|convert|reshard|index|verify|ls ...``"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields

from dltrain import storage
from dltrain.cli.main import Parser
from dltrain.cli.shards_plan import add_parser as add_plan
from dltrain.cli.shards_plan import run as plan
from dltrain.cli.sizes import size_of
from dltrain.config import Config, load_overrides, split_arguments
from dltrain.data.building.build import build_shards
from dltrain.data.building.indexing import index_shards
from dltrain.data.building.listing import sample_lines, shard_lines
from dltrain.data.building.progress import Progress, size_text
from dltrain.data.building.resharding import open_reshard
from dltrain.data.building.verifying import verify_shards
from dltrain.data.bundled import build
from dltrain.data.formats.opening import FORMATS, Options, open_source
from dltrain.data.manifest import Manifest, load_manifest
from dltrain.data.writer import Limits
from dltrain.errors import UserError

_WHAT = "Make, check and look at data sets of shards. Settings of storage are taken too: --storage.profile NAME."

_CONVERT = {
    "--fields": "fields of a sample by column: jpg=image,cls=label; or the channels of series",
    "--key": "the column that names samples (default: file and row)",
    "--label": "the column (csv) or attribute (ground-truth) of classes",
    "--series": "csv: the column whose rows of one value are one time series",
    "--time": "csv: the column of times of a series; it becomes no channel",
    "--delimiter": "csv: what stands between columns (default: a comma; a tab in .tsv)",
}


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands on shards."""
    parser = Parser(prog="dltrain shards", description=_WHAT)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_making(commands)
    _add_looking(commands)
    add_plan(commands)
    words, overrides = split_arguments(arguments)
    other = next((name for name in overrides if not name.startswith("storage.")), None)
    if other is not None:
        raise UserError(f"there is no option --{other} here; of the settings, those of storage are taken")
    storage.configure(load_overrides(Config(), overrides).storage)
    known = parser.parse_args(words)
    {
        "build": _build,
        "convert": _convert,
        "reshard": _reshard,
        "index": _index,
        "verify": _verify,
        "ls": _list,
        "plan": plan,
    }[known.command](known)
    return 0


def _add_making(commands: argparse._SubParsersAction[Parser]) -> None:
    build = commands.add_parser("build", help="write a bundled data set (digits, co2) as shards")
    build.add_argument("name")
    build.add_argument("url")
    convert = commands.add_parser("convert", help="write shards from tars, Parquet, records, images, CSV")
    convert.add_argument("source", help="a file or folder, here or on S3")
    convert.add_argument("url", help="where the shards go")
    for flag, text in _CONVERT.items():
        convert.add_argument(flag, default="", help=text)
    convert.add_argument("--from", dest="kind", default="", help=f"{', '.join(FORMATS)} (default: told by the names)")
    convert.add_argument("--series-per-file", action="store_true", help="csv: every file is one time series")
    convert.add_argument("--season", type=int, default=1, help="csv: steps of a season, for the scale of the error")
    reshard = commands.add_parser("reshard", help="write a data set anew in shards of another size or order")
    reshard.add_argument("source", help="the data set")
    reshard.add_argument("url", help="where the new shards go")
    reshard.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle all samples")
    for command in (convert, reshard):
        command.add_argument("--samples-per-shard", type=int, help="at most so many (default: no limit)")
        command.add_argument("--bytes-per-shard", default="256MiB", help="at most so many (default: %(default)s)")
        command.add_argument("--workers", type=int, default=1, help="processes; the shards are the same for any number")


def _add_looking(commands: argparse._SubParsersAction[Parser]) -> None:
    index = commands.add_parser("index", help="index the tars, TFRecord or RecordIO files of a folder where they lie")
    index.add_argument("url")
    index.add_argument("--at", default="", help="where indexes and manifest go, if not beside the files")
    verify = commands.add_parser("verify", help="read every byte and compare it with its checksum")
    verify.add_argument("url")
    for command in (index, verify):
        command.add_argument("--workers", type=int, default=1, help="processes")
    ls = commands.add_parser("ls", help="list the shards of a data set")
    ls.add_argument("url")
    ls.add_argument("--samples", action="store_true", help="list every sample with the bytes of its fields")


def _build(known: argparse.Namespace) -> None:
    for url in build(known.name, known.url):
        print(f"wrote {load_manifest(url).samples} samples to {url}")


def _convert(known: argparse.Namespace) -> None:
    given = {field.name: getattr(known, field.name) for field in fields(Options)}
    options = Options(**{**given, "fields": _mapping(known.fields)})
    limits = _limits(known)
    source = open_source(known.source, known.kind, options)
    with Progress("converting") as progress:
        manifest = build_shards(source, known.url, limits=limits, workers=known.workers, watch=progress)
    _conclude("wrote", manifest)


def _reshard(known: argparse.Namespace) -> None:
    limits, source = _limits(known), open_reshard(known.source, known.shuffle)
    with Progress("resharding") as progress:
        manifest = build_shards(source, known.url, limits=limits, workers=known.workers, watch=progress)
    _conclude("wrote", manifest)


def _index(known: argparse.Namespace) -> None:
    with Progress("indexing") as progress:
        manifest = index_shards(known.url, known.at, known.workers, progress)
    _conclude("indexed", manifest)


def _verify(known: argparse.Namespace) -> None:
    with Progress("verifying") as progress:
        manifest = verify_shards(known.url, known.workers, progress)
    print(f"{len(manifest.shards)} shards of {manifest.url} are whole: {manifest.samples} samples, each key once")


def _list(known: argparse.Namespace) -> None:
    manifest = load_manifest(known.url)
    for line in sample_lines(manifest) if known.samples else shard_lines(manifest):
        print(line)
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards, fingerprint {manifest.fingerprint}")


def _conclude(done: str, manifest: Manifest) -> None:
    """What was made and where, for people and, in the last line, for programs."""
    size = sum(shard.bytes for shard in manifest.shards)
    print(f"{done} {manifest.samples} samples in {len(manifest.shards)} shards, {size_text(size)}: {manifest.url}")
    counts = {"samples": manifest.samples, "shards": len(manifest.shards), "bytes": size}
    print(json.dumps({"url": manifest.url, **counts, "fingerprint": manifest.fingerprint}))


def _limits(known: argparse.Namespace) -> Limits:
    return Limits(known.samples_per_shard, size_of("--bytes-per-shard", known.bytes_per_shard))


def _mapping(text: str) -> dict[str, str] | None:
    """``jpg=image,cls=label`` as a dictionary; a name alone stands for itself."""
    if not text:
        return None
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if not all(field and (column or not equals) for field, equals, column in pairs):
        raise UserError(f"--fields is {text!r}; give fields by column, such as jpg=image,cls=label")
    return {field: column or field for field, _, column in pairs}
