"""From what ran when to where the time went: computing, communicating, copying, and waiting.

table = exposure([Span("compute", 0.0, 4.0), Span("communication", 3.0, 6.0)], begin=0.0, end=8.0)
table.exposed  # 2.0: of communication nothing was computed beside
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

Kind = Literal["compute", "communication", "copy"]

Interval = tuple[float, float]


class Span(NamedTuple):
    """What a device or a thread did from one moment to another, in seconds."""

    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class Exposure:
    """Seconds. ``communication`` and ``copy`` are all there was of them, ``exposed`` and ``copying`` what of them
    shows: nothing was computed beside. ``idle`` is the rest."""

    total: float
    compute: float
    communication: float
    exposed: float
    copy: float
    copying: float
    idle: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def exposure(spans: Iterable[Span], begin: float, end: float) -> Exposure:
    """How the time between two moments was spent."""
    found: dict[Kind, list[Interval]] = {"compute": [], "communication": [], "copy": []}
    for span in spans:
        if span.end > begin and span.start < end:
            found[span.kind].append((max(span.start, begin), min(span.end, end)))
    computing = union(found["compute"])
    talking, copying = union(found["communication"]), union(found["copy"])
    shown = without(talking, computing)
    copies = without(copying, union([*computing, *talking]))
    spent = length(computing) + length(shown) + length(copies)
    return Exposure(
        end - begin, length(computing), length(talking), length(shown), length(copying), length(copies),
        max(0.0, end - begin - spent),
    )  # fmt: skip


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What is in any of them, in order and without overlaps."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


def without(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What is in ``intervals`` and not in ``others``; both in order and without overlaps."""
    found: list[Interval] = []
    place = 0
    for start, end in intervals:
        while place < len(others) and others[place][1] <= start:
            place += 1
        ahead = place
        while ahead < len(others) and others[ahead][0] < end:
            if others[ahead][0] > start:
                found.append((start, others[ahead][0]))
            start = max(start, others[ahead][1])
            ahead += 1
        if start < end:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of all of them together."""
    return sum(end - start for start, end in intervals)
