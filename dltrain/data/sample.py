"""One sample as a reader hands it out, before decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dltrain.errors import UserError


class BadSample(UserError):
    """A sample that cannot be read as it was written: damaged, cut off, or not to be decoded."""


@dataclass(slots=True)
class Sample:
    """Fields by extension (``{"png": bytes, "cls": bytes}``), the sample's key, and the URL of its shard."""

    key: str
    fields: dict[str, Any]
    shard: str

    @property
    def where(self) -> str:
        """URL of the shard and key, for messages."""
        return f"{self.shard}#{self.key}"
