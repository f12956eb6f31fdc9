"""What a rule has found: what, where, why it matters and what to try, with the numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """``where`` are names of tensors, modules or samples; ``numbers`` by name."""

    rule: str
    step: int
    what: str
    why: str
    advice: str
    where: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.rule} at step {self.step}: {self.what}. {self.why} {self.advice}"

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Finding:
        """Of a parsed line of :meth:`as_json`."""
        return cls(**{**record, "where": tuple(record["where"])})
