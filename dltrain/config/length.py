"""Lengths and intervals that carry their unit: ``2ep`` (epochs), ``100st`` (optimizer steps), ``0.5h`` (hours).

One type serves the run's length, evaluation, saving, logging and warm-up, so that no setting has to say in its name
what it counts. The value is an exact fraction: ``0.1ep`` ten times over is one epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ep|st|h)\s*$")


@dataclass(frozen=True)
class Length:
    """A number of epochs, optimizer steps or hours."""

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: Any) -> Length:
        """Read ``"2ep"``, ``"100st"`` or ``"0.5h"``. Raises ``ValueError`` for anything else."""
        if isinstance(text, Length):
            return text
        match = _PATTERN.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{text!r} has no known unit; write epochs as '2ep', steps as '100st', hours as '0.5h'")
        value = Fraction(match[1])
        if match[2] == "st" and value.denominator != 1:
            raise ValueError(f"{text!r} is not a whole number of steps")
        return cls(value, match[2])

    def __str__(self) -> str:
        number = str(self.value.numerator) if self.value.denominator == 1 else repr(float(self.value))
        return f"{number}{self.unit}"

    def __bool__(self) -> bool:
        return self.value > 0

    @property
    def seconds(self) -> float:
        """Seconds of a length in hours."""
        return float(self.value) * 3600

    def due(self, before: tuple[int, int], after: tuple[int, int], samples: int) -> bool:
        """Whether a multiple of this interval lies in ``(before, after]``.

        Both ends are ``(step, position)``; ``position`` counts samples over all epochs. Zero is never due, and hours
        never are: time differs between ranks and is agreed on by request.
        """
        if not self.value or self.unit == "h":
            return False
        index, scale = (0, 1) if self.unit == "st" else (1, samples)
        stride, parts = self.value.numerator * scale, self.value.denominator
        return after[index] * parts // stride > before[index] * parts // stride

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )
