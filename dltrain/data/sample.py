"""One sample as a reader hands it out, before decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Fields by extension (``{"png": bytes, "cls": bytes}``), the sample's key, and where it came from."""

    key: str
    fields: dict[str, Any]
    where: str
    """URL of the shard and key, for messages."""
