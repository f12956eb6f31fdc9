"""Tars in webdataset's convention: read in one pass, and the bytes of a member's header.

A sequential parser of ustar, GNU and pax archives, some three times as fast as :mod:`tarfile` on small members. Members
that share a key and lie next to each other are one sample; directories, links and webdataset's ``__meta__`` are passed
over.

    with storage.open_object("s3://bucket/digits/shard-000000.tar") as file:
        index = scan(file, "s3://bucket/digits/shard-000000.tar").index
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from dltrain.data.formats.tape import CHUNK, Scan, Tape
from dltrain.data.index import IndexBuilder

BLOCK = 512
RECORD = 20 * BLOCK
"""A tar ends with two blocks of zeros and is filled up to a multiple of this."""

_ZEROS = bytes(BLOCK)
_LARGEST = 8**11 - 1
"""Bytes of a member whose size fits ustar's eleven octal digits."""

# kinds of member, by the byte in the header
_FILES = (b"0", b"\0", b"7")
_WITHOUT_BODY = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENDED, _GLOBAL, _LONG_NAME, _SPARSE = (b"x", b"X"), b"g", b"L", b"S"

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One file of a tar: its name, its first byte and its bytes."""

    name: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member's name as webdataset takes them, or None for one that is no part of a sample.

    The key is folder and base name up to its first dot; the rest, in lower case, is the field.
    """
    match = _NAME.match(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


class TarReader:
    """The files of a tar, one after the other.

    Iterate, and take each member's bytes by :meth:`read` or :meth:`checksum` before the next is asked for. Memory is
    one member under :meth:`read`, else 1 MiB. Raises :class:`UserError` for a tar that is damaged, cut short or not
    one.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self.tape = Tape(file, where)
        self._left = 0
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        tape, extended = self.tape, dict[str, str]()
        while block := self._block():
            kind, name, size = self._parse(block)
            if kind in _EXTENDED or kind in (_GLOBAL, _LONG_NAME):
                self._extend(kind, size, extended)
                continue
            if extended or self._global:
                name, size = _overridden(name, size, {**self._global, **extended})
                extended = {}
            if kind == _SPARSE:
                raise tape.error(f"holds the sparse file {name}; pack it anew without --sparse")
            tape.last, self._left = name, 0 if kind in _WITHOUT_BODY else size
            padding = -self._left % BLOCK
            if kind in _FILES and name[-1:] != "/":
                yield Member(name, tape.position, size)
            tape.skip(self._left + padding)
        self._finish()

    def read(self) -> bytes:
        """The bytes of the present member."""
        left, self._left = self._left, 0
        return self.tape.take(left)

    def checksum(self) -> int:
        """The crc32c of the present member's bytes."""
        left, self._left = self._left, 0
        return self.tape.checksum(left)

    def _block(self) -> bytes:
        """The next header; nothing at the end of the archive."""
        block = self.tape.take(BLOCK)
        return b"" if block == _ZEROS else block

    def _parse(self, block: bytes) -> tuple[bytes, str, int]:
        """Kind, name and size. Raises :class:`UserError` where the header's own checksum differs."""
        tape = self.tape
        try:
            stated, size = _number(block[148:156]), _number(block[124:136])
        except ValueError:
            raise tape.error(f"has no header at byte {tape.position - BLOCK}{tape.after()}; it is no tar") from None
        # the checksum is taken with its own eight bytes as blanks
        if sum(block) - sum(block[148:156]) + 256 != stated and _signed_sum(block) != stated:
            raise tape.error(
                f"has a damaged header at byte {tape.position - BLOCK}{tape.after()}: its checksum differs"
            )
        name = block[:100].partition(b"\0")[0]
        if block[345] and block[257:263] == b"ustar\0":
            name = block[345:500].partition(b"\0")[0] + b"/" + name
        return block[156:157], self._text(name), size

    def _extend(self, kind: bytes, size: int, extended: dict[str, str]) -> None:
        """Read a header's body that says more of the next member, or of all that follow."""
        body = self.tape.take(size)
        self.tape.skip(-size % BLOCK)
        if kind == _LONG_NAME:
            extended["path"] = self._text(body.rstrip(b"\0"))
        else:
            (self._global if kind == _GLOBAL else extended).update(self._pax(body))

    def _pax(self, body: bytes) -> dict[str, str]:
        """Records ``LENGTH KEYWORD=VALUE\\n``, of which path and size matter."""
        records, rest = dict[str, str](), body.rstrip(b"\0")
        while rest:
            digits, _, _ = rest[:20].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            keyword, equals, value = rest[len(digits) + 1 : length - 1].partition(b"=")
            sound = equals and rest[length - 1 : length] == b"\n" and (keyword != b"size" or value.isdigit())
            if not sound:
                raise self.tape.error(f"has a damaged pax header before byte {self.tape.position}{self.tape.after()}")
            if keyword.startswith(b"GNU.sparse"):
                raise self.tape.error(f"holds a sparse file{self.tape.after()}; pack it anew without --sparse")
            if keyword in (b"path", b"size"):
                records[keyword.decode()] = self._text(value)
            rest = rest[length:]
        return records

    def _text(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise self.tape.error(f"has the member {name!r}, whose name is not UTF-8; rename it") from None

    def _finish(self) -> None:
        """Read what fills the last record. What lies behind the end of the archive no reader of tars would see."""
        while data := self.tape.take_up_to(CHUNK):
            if data.strip(b"\0"):
                raise self.tape.error(
                    f"goes on behind its end, before byte {self.tape.position}{self.tape.after()}: tars put one after "
                    "the other are no tar; pack their files anew"
                )


def _overridden(name: str, size: int, extended: dict[str, str]) -> tuple[str, int]:
    return extended.get("path", name), int(extended.get("size", size))


def members(reader: TarReader) -> Iterator[tuple[str, str, Member]]:
    """Key, field and place of every member of a sample. Raises :class:`UserError` for what would be there twice."""
    keys, fields, present, error = set[str](), set[str](), "", reader.tape.error
    for member in reader:
        name = split_name(member.name)
        if name is None:
            continue
        key, field = name
        if key != present:
            if key in keys:
                raise error(
                    f"holds sample {key!r} twice, the second at member {member.name}, byte {member.offset}; "
                    "the members of a sample must lie next to each other, each sample once"
                )
            keys.add(key)
            present, fields = key, set()
        if field in fields:
            raise error(f"holds member {member.name} twice, the second at byte {member.offset}")
        fields.add(field)
        yield key, field, member


def scan(file: BinaryIO, where: str) -> Scan:
    """Index a tar in one pass, in bounded memory. Raises :class:`UserError` when it is damaged or cut short."""
    reader, builder = TarReader(file, where), IndexBuilder()
    for key, field, member in members(reader):
        builder.add(key, field, member.offset, member.size, reader.checksum())
    return Scan(builder.build(), reader.tape.position, reader.tape.crc32c)


def read_samples(file: BinaryIO, where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample, in the order of the tar: its key, and its bytes by field."""
    return grouped(TarReader(file, where))


def grouped(reader: TarReader) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of an open tar: members that share a key and lie next to each other."""
    present, fields = "", dict[str, bytes]()
    for key, field, _ in members(reader):
        if fields and key != present:
            yield present, fields
            fields = {}
        present = key
        fields[field] = reader.read()
    if fields:
        yield present, fields


def header(name: str, size: int) -> bytes:
    """The header blocks of a file of ``size`` bytes: ustar, with a pax header before it where the name needs one."""
    prefix, base = _split(name.encode())
    if base and size <= _LARGEST:
        head = b"%b%b%011o\0%011o\0" % (base.ljust(100, b"\0"), _OWNER, size, 0)
        tail = _USTAR + prefix.ljust(155, b"\0") + bytes(12)
        checksum = sum(head) + sum(tail) + 256
        return b"%b%06o\0 %b" % (head, checksum, tail)
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.PAX_FORMAT)


def end(size: int) -> bytes:
    """What ends a tar of ``size`` bytes: two blocks of zeros, and more to fill the record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)


_OWNER = b"0000444\0" + b"0000000\0" * 2
_USTAR = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Prefix and base of a name for ustar; two empty ones where it does not fit."""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    return (name[:cut], name[cut + 1 :]) if 0 < cut <= 155 and cut + 1 < len(name) else (b"", b"")


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where the first bit is set. Raises ``ValueError``."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _signed_sum(block: bytes) -> int:
    """The checksum as some old programs took it, over signed bytes."""
    return sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 256
