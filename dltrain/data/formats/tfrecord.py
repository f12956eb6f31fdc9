"""TFRecord with ``tf.train.Example``, read without TensorFlow.

A record is its length, the masked crc32c of the length, its bytes and their masked crc32c; both are checked.

    for _, payload in frames(Tape(file, url)):
        image = parse_example(payload)["image/encoded"][0]

Reference: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import google_crc32c
from numpy.typing import NDArray

from dltrain.data.formats import wire
from dltrain.data.formats.tape import Tape

EXTENSION = "tfrecord"
_BYTES, _FLOATS, _INTEGERS = 1, 2, 3


def frames(tape: Tape) -> Iterator[tuple[int, bytes]]:
    """First byte and bytes of each record. Raises :class:`UserError` naming record and byte of a damage."""
    number = 0
    while head := tape.take_up_to(12):
        tape.last = f"record {number}"
        if len(head) < 12:
            raise tape.error(f"is truncated: it ends at byte {tape.position} in record {number}")
        size, checksum = struct.unpack("<QI", head)
        if masked_crc32c(head[:8]) != checksum:
            raise tape.error(f"has no record at byte {tape.position - 12}, where record {number} should begin")
        place = tape.position
        payload = tape.take(size)
        if masked_crc32c(payload) != struct.unpack("<I", tape.take(4))[0]:
            raise tape.error(f"is damaged in record {number}, bytes {place} to {place + size}")
        yield place, payload
        number += 1


def write_records(file: BinaryIO, payloads: Iterable[bytes]) -> None:
    """Frame each payload."""
    for payload in payloads:
        size = struct.pack("<Q", len(payload))
        file.write(b"%b%b%b" % (size, struct.pack("<I", masked_crc32c(size)), payload))
        file.write(struct.pack("<I", masked_crc32c(payload)))


def masked_crc32c(data: bytes) -> int:
    """The crc32c, rotated by 15 bits and moved, as TFRecord stores it."""
    crc32c = google_crc32c.value(data)
    return ((crc32c >> 15 | crc32c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(payload: bytes) -> dict[str, NDArray[Any] | list[bytes]]:
    """The features of a ``tf.train.Example`` by name: float32 or int64 arrays [n], or lists of bytes.

    Raises ``ValueError`` for what is none, and for a ``SequenceExample``.
    """
    parts = wire.messages(memoryview(payload))
    if set(parts) - {1}:
        raise ValueError("it is no tf.train.Example (a SequenceExample has to be unrolled first)")
    features = [value for message in parts.get(1, []) for value in wire.messages(message).get(1, [])]
    return {name: _feature(value) for name, value in wire.entries(features)}


def _feature(message: memoryview) -> NDArray[Any] | list[bytes]:
    for kind, body in wire.messages(message).items():
        values = [value for number, value in wire.fields(body[-1]) if number == 1]
        if kind == _FLOATS:
            return wire.floats(values, "<f4")
        if kind == _INTEGERS:
            return wire.integers(values)
        if kind == _BYTES:
            return [bytes(value) for value in values if not isinstance(value, int)]
    return []
