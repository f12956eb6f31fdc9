"""Finding out what a URL holds, and opening it as a source of samples.

source = open_source("/data/flowers", options=Options(fields={"jpg": "image", "cls": "label"}))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

from dltrain import storage
from dltrain.data.formats import csv_tables
from dltrain.data.formats.compression import open_stream
from dltrain.data.formats.fields import as_fields
from dltrain.data.formats.folder import EXTENSIONS, FolderDataset
from dltrain.data.formats.ground_truth import GroundTruthDataset
from dltrain.data.formats.parquet import ParquetDataset
from dltrain.data.formats.records import ReadRecords
from dltrain.data.formats.source import DatasetSource, FileSource, Keyed, Source, find_files, folder_url, is_object
from dltrain.data.formats.tar import read_samples
from dltrain.data.manifest import known_facts
from dltrain.data.reader import Dataset
from dltrain.errors import UserError, nearest

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SUFFIXES = {
    "tar": _TARS,
    "parquet": (".parquet", ".pq"),
    "recordio": (".rec", ".recordio", ".pbr"),
    "folder": tuple(f".{extension}" for extension in EXTENSIONS),
    "csv": (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".tsv"),
    "ground-truth": (".manifest", ".jsonl"),
}


@dataclass(frozen=True)
class Options:
    """How samples are made of what a source holds; see ``dltrain shards convert --help``."""

    fields: Mapping[str, str] | None = None
    key: str = ""
    label: str = ""
    series: str = ""
    series_per_file: bool = False
    time: str = ""
    season: int = 1
    delimiter: str = ""

    def __post_init__(self) -> None:
        if self.season < 1:
            raise UserError(f"--season is {self.season}; give 1 or more steps")
        if len(self.delimiter.replace("\\t", "\t")) > 1:
            raise UserError(f"--delimiter is {self.delimiter!r}; give one character")


def kind_of(name: str) -> str:
    """What a file is by its name: tar, parquet, recordio, tfrecord, folder, csv, ground-truth, or ''."""
    base = name.rpartition("/")[2].lower()
    if base.startswith(".") or base.endswith((".idx", ".json")):
        return ""
    if "tfrec" in base:
        return "tfrecord"
    return next((kind for kind, suffixes in _SUFFIXES.items() if base.endswith(suffixes)), "")


def guess(url: str) -> str:
    """What the URL holds. Raises :class:`UserError` where that cannot be told from the names."""
    names = [url] if is_object(url) else storage.listing(folder_url(url))
    kinds = sorted({kind_of(name) for name in names} - {""})
    if len(kinds) == 1:
        return kinds[0]
    if not names:
        raise UserError(f"there is nothing at {url}; check the URL")
    found = f"files of the kinds {', '.join(kinds)}" if kinds else "no files of a kind known by its name"
    raise UserError(f"{url} holds {found}; say what to read with --from")


def open_source(url: str, kind: str = "", options: Options | None = None) -> Source:
    """The samples at ``url``, which are of ``kind`` or what their names tell. Raises :class:`UserError`."""
    kind, options = kind or guess(url), options or Options()
    if kind not in _OPENERS:
        raise UserError(f"there is no format {kind!r}; {nearest(kind, _OPENERS)}")
    opener, used = _OPENERS[kind]
    for option in fields(Options):
        if option.name not in used and getattr(options, option.name) != option.default:
            raise UserError(f"--{option.name.replace('_', '-')} does not go with --from {kind}")
    return opener(url, options)


@dataclass(frozen=True)
class ReadTar:
    """The samples of a tar, compressed or not; all fields, or those that ``fields`` names anew."""

    fields: Mapping[str, str] | None = None

    def __call__(self, url: str) -> Iterator[Keyed]:
        with open_stream(url) as file:
            for key, found in read_samples(file, url):
                try:
                    yield key, found if self.fields is None else as_fields(found, self.fields)
                except UserError as error:
                    raise UserError(f"sample {key!r} of {url}: {error}") from None


def _open_tars(url: str, options: Options) -> Source:
    files = find_files(url, lambda name: kind_of(name) == "tar", "tars")
    return FileSource(files, ReadTar(options.fields), known_facts(url), options)


def _open_parquet(url: str, options: Options) -> Source:
    dataset = ParquetDataset(url, options.fields, options.key)
    return DatasetSource(dataset, dataset.bytes_per_sample())


def _open_records(kind: str) -> Callable[[str, Options], Source]:
    def opened(url: str, options: Options) -> Source:
        files = find_files(url, lambda name: kind_of(name) == kind, f"{kind} files")
        return FileSource(files, ReadRecords(kind, url, options.fields, options.key), settings=options)

    return opened


def _open_folder(url: str, options: Options) -> Source:
    dataset = FolderDataset(url)
    return DatasetSource(dataset, dataset.bytes_per_sample())


def _open_ground_truth(url: str, options: Options) -> Source:
    files = find_files(url, lambda name: kind_of(name) == "ground-truth", "augmented manifests")
    if len(files) > 1:
        raise UserError(f"there are {len(files)} manifests at {url}; name the one to read")
    dataset = GroundTruthDataset(files[0], options.label)
    return DatasetSource(dataset, dataset.bytes_per_sample())


def _open_csv(url: str, options: Options) -> Source:
    files = find_files(url, lambda name: kind_of(name) == "csv", "CSV files")
    table = csv_tables.Table(options.delimiter.replace("\\t", "\t"))
    if options.series or options.series_per_file:
        return _open_series(url, files, table, options)
    if options.time or options.season != 1:
        raise UserError("--time and --season are for series: give --series COLUMN or --series-per-file too")
    classes = csv_tables.find_classes(table, files, options.label) if options.label else {}
    read = csv_tables.ReadRows(table, url, options.fields, options.key, options.label, classes)
    named = {place: name for name, place in classes.items()}
    return FileSource(files, read, {"classes": [named[n] for n in sorted(named)]} if named else {}, options)


def _open_series(url: str, files: list[str], table: csv_tables.Table, options: Options) -> Source:
    if options.label or options.key:
        raise UserError("--label and --key are for rows that are samples, not for series")
    others = (options.series, options.time)
    channels = tuple(options.fields.values()) if options.fields else csv_tables.find_channels(table, files[0], others)
    read = csv_tables.ReadSeries(table, url, options.series, options.time, channels)
    scales = csv_tables.find_scales(files, read, options.season)
    facts = {"season": options.season, "channels": list(channels), "series": scales}
    return FileSource(files, read, facts, options)


_OPENERS: dict[str, tuple[Callable[[str, Options], Source], frozenset[str]]] = {
    "tar": (_open_tars, frozenset({"fields"})),
    "parquet": (_open_parquet, frozenset({"fields", "key"})),
    "recordio": (_open_records("recordio"), frozenset({"fields", "key"})),
    "tfrecord": (_open_records("tfrecord"), frozenset({"fields", "key"})),
    "folder": (_open_folder, frozenset()),
    "csv": (_open_csv, frozenset(field.name for field in fields(Options))),
    "ground-truth": (_open_ground_truth, frozenset({"label"})),
}

FORMATS = tuple(_OPENERS)

DIRECT: dict[str, Callable[[str], Dataset]] = {
    "parquet": ParquetDataset,
    "folder": FolderDataset,
    "ground-truth": GroundTruthDataset,
}
"""What can be trained from as it lies, without shards."""
