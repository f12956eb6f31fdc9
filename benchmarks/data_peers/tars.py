"""A tar read from front to end by the standard library, for those who have no reader of tars of their own."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any


def members(file: Any, buffer: int = 1 << 20) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every member; ``file`` needs nothing but ``read``."""
    with tarfile.open(fileobj=file, mode="r|", bufsize=buffer) as tar:
        for member in tar:
            data = tar.extractfile(member)
            if data is not None:
                yield member.name, data.read()
