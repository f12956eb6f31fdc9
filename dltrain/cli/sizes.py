"""Bytes as they are written on a command line: 256MiB, 1GB."""

from __future__ import annotations

import re

from dltrain.errors import UserError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def size_of(option: str, text: str) -> int:
    """The bytes that ``option`` was given as ``text``. Raises :class:`UserError` for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"{option} is {text!r}; give bytes with a unit, such as 256MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
