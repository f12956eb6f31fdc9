"""Functions and rules that tests name by ``module.name``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dltrain.debugger.findings import Finding
from dltrain.debugger.rules.base import Rule
from dltrain.debugger.seen import Seen


@dataclass
class LossBelow(Rule):
    """The loss is below ``threshold``."""

    threshold: float = 10.0

    def update(self, seen: Seen) -> Iterable[Finding]:
        if seen.loss and seen.loss < self.threshold:
            yield self.finding(seen.step, f"the loss is {seen.loss:.3g}", loss=seen.loss)


@dataclass
class InTheWay(Rule):
    """Puts a file where the folder of traces would be."""

    def update(self, seen: Seen) -> None:
        for run in Path("runs").iterdir():
            blocked = run / "debugger" / "trace"
            if not blocked.exists():
                blocked.write_text("in the way")


def note(finding: Finding) -> None:
    """Writes a line beside the run."""
    with Path("noted.txt").open("a") as file:
        file.write(f"{finding.rule} {finding.step}\n")


def fail(finding: Finding) -> None:
    raise ValueError("no such number")
