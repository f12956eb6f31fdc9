"""One record of smdebug's event files: a tensor, or a number. Their checksums are of other bytes and are not looked at.

time, array = read_record(storage.read(url, start, start + length), where=url)
"""

from __future__ import annotations

from struct import Struct
from typing import Any

import numpy as np

from dltrain.errors import UserError

Values = np.ndarray[Any, np.dtype[Any]]

_LENGTH = Struct("<Q")
_CHECKSUM = 4
"""Bytes of each of the two checksums: one after the length, one after the event."""


def read_record(record: bytes | bytearray, where: str) -> tuple[float, Values]:
    """Seconds since 1970, and the values in their own shape and dtype. Raises :class:`UserError` for what is none."""
    from google.protobuf.message import DecodeError  # these are slow to import
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.util.tensor_util import make_ndarray

    begin = _LENGTH.size + _CHECKSUM
    length = _LENGTH.unpack_from(record)[0] if len(record) >= begin else -1
    if len(record) != begin + length + _CHECKSUM:
        raise UserError(f"{where} ends within a record, or is no event file; copy it again")
    try:
        event = Event.FromString(bytes(record[begin : begin + length]))
        return event.wall_time, make_ndarray(event.summary.value[0].tensor)
    except (DecodeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{where} holds a record that is no tensor ({error}); copy it again") from None
