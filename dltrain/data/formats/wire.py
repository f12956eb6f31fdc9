"""Protocol buffers' wire format: enough to read and write records without their library.

    for number, value in fields(memoryview(message)):
        ...  # an int of a varint, the bytes of everything else

Reference: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = int | memoryview
_FIXED = {1: 8, 5: 4}


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field, in order. Raises ``ValueError`` for what is no message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(message, place)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {place} of the message")
        if place + size > len(message):
            raise ValueError(f"field {tag >> 3} ends at byte {place + size} of {len(message)}")
        yield tag >> 3, message[place : place + size]
        place += size


def messages(message: memoryview) -> dict[int, list[memoryview]]:
    """The values of a message that holds no varints, by number."""
    found: dict[int, list[memoryview]] = {}
    for number, value in fields(message):
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number, not bytes")
        found.setdefault(number, []).append(value)
    return found


def entries(messages_of_map: Sequence[memoryview]) -> Iterator[tuple[str, memoryview]]:
    """Key and value of each entry of a map from strings to messages."""
    for entry in messages_of_map:
        parts = messages(entry)
        yield bytes(parts.get(1, [memoryview(b"")])[-1]).decode(), parts.get(2, [memoryview(b"")])[-1]


def floats(values: Sequence[Value], dtype: str) -> NDArray[Any]:
    """Repeated numbers of fixed size, packed or one by one, as an array of ``dtype``."""
    return np.frombuffer(b"".join(value for value in values if not isinstance(value, int)), dtype)


def integers(values: Sequence[Value]) -> NDArray[np.int64]:
    """Repeated varints, packed or one by one."""
    parts = [np.array([value], np.uint64) if isinstance(value, int) else _packed(value) for value in values]
    return np.concatenate([np.empty(0, np.uint64), *parts]).view(np.int64)


def _packed(data: memoryview) -> NDArray[np.uint64]:
    octets = np.frombuffer(data, np.uint8)
    last = octets < 0x80
    if not len(octets) or last.all():
        return octets.astype(np.uint64)
    if not last[-1]:
        raise ValueError("a packed list of numbers ends within one")
    first = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    lengths = np.diff(np.append(first, len(octets)))
    place = np.arange(len(octets)) - np.repeat(first, lengths)
    return np.add.reduceat((octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), first)


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError(f"no number at byte {place} of the message")
        octet = data[place]
        value |= (octet & 0x7F) << shift
        place += 1
        if octet < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, place
        shift += 7


def varint(value: int) -> bytes:
    """A number as protocol buffers write it; negative ones as their 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def field(number: int, body: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def packed(values: Sequence[int]) -> bytes:
    """A packed list of varints."""
    return b"".join(map(varint, values))
