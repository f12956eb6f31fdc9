"""What one check found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from dltrain.errors import UserError

State = Literal["good", "doubtful", "bad"]


@dataclass(frozen=True)
class Checked:
    """``said`` is a sentence: what was seen, and what to change where that is not good."""

    name: str
    state: State
    said: str


Check = Callable[[], Iterable[Checked]]


def all_of(checks: Iterable[tuple[str, Check]]) -> Iterator[Checked]:
    """Run them one after another; one that cannot be made says so, and the others go on."""
    for name, check in checks:
        try:
            yield from check()
        except UserError as error:
            yield Checked(name, "bad", str(error))
        except Exception as error:  # noqa: BLE001 - a machine that is ill breaks in ways that nobody thought of
            yield Checked(name, "bad", f"could not be looked at: {type(error).__name__}: {error}")
