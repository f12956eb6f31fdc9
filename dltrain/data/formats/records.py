"""Files of records, RecordIO and TFRecord: indexed where they lie, or read through.

In an index a record is a sample of one member, which is the record's payload; ``parse`` makes values of it.

    with storage.open_object(url) as file:
        index = scan(file, url, "tfrecord", key="train-00000").index
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import google_crc32c

from dltrain.data.formats import recordio, tfrecord
from dltrain.data.formats.compression import open_stream
from dltrain.data.formats.fields import as_fields, key_of
from dltrain.data.formats.source import Keyed, inside, stem
from dltrain.data.formats.tape import Scan, Tape
from dltrain.data.index import IndexBuilder
from dltrain.errors import UserError

Parsed = dict[str, Any]


@dataclass(frozen=True)
class RecordFormat:
    """How a file is cut into records, what a record says, and the field it is in an index."""

    frames: Callable[[Tape], Iterator[tuple[int, bytes]]]
    parse: Callable[[bytes], Parsed]
    extension: str


RECORDS = {
    "recordio": RecordFormat(recordio.frames, recordio.parse_record, recordio.EXTENSION),
    "tfrecord": RecordFormat(tfrecord.frames, tfrecord.parse_example, tfrecord.EXTENSION),
}


def scan(file: BinaryIO, where: str, format: str, key: str) -> Scan:
    """Index a file of records in one pass; the samples' keys are ``KEY/00000000`` and so on."""
    tape, builder = Tape(file, where), IndexBuilder()
    for number, (place, payload) in enumerate(RECORDS[format].frames(tape)):
        extension = RECORDS[format].extension
        builder.add(record_key(key, number), extension, place, len(payload), google_crc32c.value(payload))
    return Scan(builder.build(), tape.position, tape.crc32c)


def record_key(key: str, number: int) -> str:
    return f"{key}/{number:08d}"


@dataclass(frozen=True)
class ReadRecords:
    """The samples of a file of records: fields as :func:`as_fields` makes them, the key as ``key`` names it."""

    format: str
    folder: str
    fields: Mapping[str, str] | None = None
    key: str = ""

    def __call__(self, url: str) -> Iterator[Keyed]:
        prefix = stem(inside(url, self.folder))
        with open_stream(url) as file:
            for number, (place, payload) in enumerate(RECORDS[self.format].frames(Tape(file, url))):
                try:
                    values = RECORDS[self.format].parse(payload)
                    key = self._key(values) if self.key else record_key(prefix, number)
                    fields = as_fields(values, self.fields)
                except ValueError as error:
                    raise UserError(f"record {number} of {url}, at byte {place}, cannot be read: {error}") from None
                yield key, fields

    def _key(self, values: Parsed) -> str:
        value = values.get(self.key)
        if value is None or len(value) != 1:
            raise UserError(f"it has no single value {self.key!r} to be the key; it has: {', '.join(values)}")
        return key_of(value[0])
