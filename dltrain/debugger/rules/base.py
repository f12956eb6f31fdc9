"""What a rule is, and running several: one that fails is switched off, and training goes on.

@dataclass
class LossTooLow(Rule):
    threshold: float = 0.01

    def update(self, seen):
        if seen.loss < self.threshold:
            yield self.finding(seen.step, f"the loss is {seen.loss:.3g}", loss=seen.loss)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from dltrain.debugger.findings import Finding
from dltrain.debugger.seen import Seen, Tensors


class Rule:
    """Derive with ``@dataclass``, parameters as fields, and yield findings from :meth:`update`.

    A rule keeps what it needs of earlier steps and is shown each step once, in order. It yields while something is
    wrong; that it was wrong at the step before, too, is not reported again.
    """

    why: ClassVar[str] = ""
    """A sentence: why what it finds matters."""
    advice: ClassVar[str] = ""
    """A sentence: what to try."""

    def update(self, seen: Seen) -> Iterable[Finding]:
        """What is wrong at this step."""
        raise NotImplementedError(f"{type(self).__name__} must say in update() what is wrong")

    def finding(self, step: int, what: str, where: Iterable[str] = (), **numbers: float) -> Finding:
        """One of this rule's."""
        return Finding(type(self).__name__, step, what, self.why, self.advice, tuple(where), dict(numbers))


class TensorRule(Rule):
    """A rule about tensors: it is shown the steps that have statistics, by :meth:`look`."""

    def update(self, seen: Seen) -> Iterable[Finding]:
        return () if seen.tensors is None else self.look(seen, seen.tensors)

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        """What is wrong with them at this step."""
        raise NotImplementedError(f"{type(self).__name__} must say in look() what is wrong")


class Watch:
    """Several rules over the steps of a run; ``failed`` is told of a rule that was switched off, and why."""

    def __init__(self, rules: Iterable[Rule], failed: Callable[[str], Any]) -> None:
        self._rules, self._failed = list(rules), failed
        self._of_every_step = [rule for rule in self._rules if not isinstance(rule, TensorRule)]
        self._wrong: dict[int, set[str]] = {}

    def update(self, seen: Seen) -> Iterator[Finding]:
        """New findings of this step."""
        for rule in self._of_every_step if seen.tensors is None else list(self._rules):
            try:
                found = list(rule.update(seen))
            except Exception as error:  # noqa: BLE001 - a rule may be anyone's
                self._rules = [each for each in self._rules if each is not rule]
                self._of_every_step = [each for each in self._of_every_step if each is not rule]
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                self._failed(f"rule {type(rule).__name__} failed at step {seen.step} and is switched off ({reason})")
                continue
            if found or id(rule) in self._wrong:
                yield from self._new(rule, found)

    def _new(self, rule: Rule, found: list[Finding]) -> Iterator[Finding]:
        before = self._wrong.get(id(rule), set())
        self._wrong[id(rule)] = {place for each in found for place in each.where or ("",)}
        for each in found:
            fresh = tuple(place for place in each.where or ("",) if place not in before)
            if fresh:
                yield replace(each, where=tuple(filter(None, fresh)))
