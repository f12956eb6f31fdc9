"""RecordIO with SageMaker's protocol buffers: the files that its built-in algorithms train from.

A record is the magic number, its length, its bytes, and zeros up to a multiple of four. The bytes are a ``Record`` of
tensors by name, ``label`` beside ``features``; a vector's usual name is ``values``.

    write_records(file, [encode_record({"values": row}, {"values": label}) for row, label in data])
    assert parse_record(payload)["values"].dtype == np.float32

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/cdf-training.html
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dltrain.data.formats import wire
from dltrain.data.formats.tape import Tape

MAGIC = 0xCED7230A
EXTENSION = "record"
_LARGEST = 1 << 29

Tensor = NDArray[Any]

# numbers of the fields of Value, and what their tensors hold
_FLOAT32, _FLOAT64, _INT32, _BYTES = 2, 3, 7, 9
_FLOATS = {_FLOAT32: "<f4", _FLOAT64: "<f8"}
_FEATURES, _LABEL, _UID = 1, 2, 3


def frames(tape: Tape) -> Iterator[tuple[int, bytes]]:
    """First byte and bytes of each record. Raises :class:`UserError` naming record and byte of a damage."""
    number = 0
    while head := tape.take_up_to(8):
        tape.last = f"record {number}"
        magic, size = struct.unpack("<II", head.ljust(8, b"\0"))
        if len(head) < 8 or magic != MAGIC:
            raise tape.error(f"has no record at byte {tape.position - len(head)}, where record {number} should begin")
        if size >= _LARGEST:
            raise tape.error(f"has record {number} in parts, as MXNet splits them; pack it anew")
        place = tape.position
        payload = tape.take(size)
        tape.skip(-size % 4)
        yield place, payload
        number += 1


def write_records(file: BinaryIO, payloads: Iterable[bytes]) -> None:
    """Frame each payload. Raises ``ValueError`` for one of half a GiB or more, which the format cannot hold whole."""
    for payload in payloads:
        if len(payload) >= _LARGEST:
            raise ValueError(f"a record of {len(payload)} bytes is too large for RecordIO")
        file.write(struct.pack("<II", MAGIC, len(payload)) + payload + bytes(-len(payload) % 4))


def parse_record(payload: bytes) -> dict[str, Tensor | list[bytes]]:
    """Features and labels by name: tensors as float32, float64 or int32 arrays, sparse ones filled with zeros; bytes.

    A label's ``values`` are called ``label``, its other names ``label.NAME``; ``uid`` is there where the record has
    one. Raises ``ValueError`` for what is no record.
    """
    parts = wire.messages(memoryview(payload))
    values = {name: _value(name, value) for name, value in wire.entries(parts.get(_FEATURES, []))}
    for name, value in wire.entries(parts.get(_LABEL, [])):
        values["label" if name == "values" else f"label.{name}"] = _value(name, value)
    if _UID in parts:
        values["uid"] = [bytes(parts[_UID][-1])]
    return values


def encode_record(
    features: Mapping[str, Tensor | bytes], label: Mapping[str, Tensor | bytes] | None = None, uid: str = ""
) -> bytes:
    """A record of dense tensors (float32, float64 or int32, any shape) and bytes. Raises ``ValueError`` for others."""
    parts = [wire.field(_FEATURES, _entry(name, value)) for name, value in features.items()]
    parts += [wire.field(_LABEL, _entry(name, value)) for name, value in (label or {}).items()]
    return b"".join(parts) + (wire.field(_UID, uid.encode()) if uid else b"")


def _value(name: str, message: memoryview) -> Tensor | list[bytes]:
    for kind, body in wire.messages(message).items():
        if kind == _BYTES:
            return [bytes(part) for part in wire.messages(body[-1]).get(1, [])]
        if kind in (_FLOAT32, _FLOAT64, _INT32):
            return _tensor(name, kind, list(wire.fields(body[-1])))
    raise ValueError(f"feature {name!r} holds no tensor and no bytes")


def _tensor(name: str, kind: int, parts: list[tuple[int, wire.Value]]) -> Tensor:
    """Field 1 are the values, 2 the places of a sparse tensor's values, 3 the shape."""
    values, keys, shape = ([value for number, value in parts if number == which] for which in (1, 2, 3))
    array = wire.integers(values).astype(np.int32) if kind == _INT32 else wire.floats(values, _FLOATS[kind])
    places, sizes = wire.integers(keys), tuple(wire.integers(shape).tolist())
    if len(array) and not len(places):
        return array.reshape(sizes) if sizes else array
    dense = np.zeros(math.prod(sizes) if sizes else 0, array.dtype)
    if len(places) != len(array) or np.any((places < 0) | (places >= len(dense))):
        raise ValueError(f"sparse feature {name!r} has {len(array)} values at {len(places)} places of shape {sizes}")
    dense[places] = array
    return dense.reshape(sizes) if sizes else dense


def _entry(name: str, value: Tensor | bytes) -> bytes:
    return wire.field(1, name.encode()) + wire.field(2, _encoded(name, value))


def _encoded(name: str, value: Tensor | bytes) -> bytes:
    if isinstance(value, bytes):
        return wire.field(_BYTES, wire.field(1, value))
    kind = {"float32": _FLOAT32, "float64": _FLOAT64, "int32": _INT32}.get(value.dtype.name)
    if kind is None:
        raise ValueError(f"feature {name!r} is {value.dtype}; a record holds float32, float64, int32 and bytes")
    flat = value.reshape(-1)
    body = wire.packed(flat.tolist()) if kind == _INT32 else flat.astype(_FLOATS[kind]).tobytes()
    tensor = wire.field(1, body)
    # like SageMaker's own writer: a vector needs no shape
    return wire.field(kind, tensor + (wire.field(3, wire.packed(value.shape)) if value.ndim > 1 else b""))
