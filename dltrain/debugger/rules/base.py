"""What a rule is, and running several: one that fails is switched off, and training goes on.

@dataclass
class LossTooLow(Rule):
    threshold: float = 0.01

    def update(self, seen):
        if seen.loss < self.threshold:
            yield self.finding(seen.step, f"the loss is {seen.loss:.3g}", loss=seen.loss)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import Needs
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
    actions: ClassVar[tuple[str, ...]] = ()
    """What follows when it finds something, beside the config's ``debugger.actions``."""

    when: ClassVar[tuple[str, ...]] = ("step",)
    """What it is shown: every step and evaluation, or only where there are "tensors", "scores", or an observation of a
    kind (:mod:`dltrain.debugger.observing`)."""

    def needs(self) -> Needs:
        """What it wants to be looked at beyond the tensors that the config collects."""
        return Needs()

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        """What is wrong at this step; ``None`` if it cannot tell, so that what was wrong before still is."""
        raise NotImplementedError(f"{type(self).__name__} must say in update() what is wrong")

    def finding(self, step: int, what: str, where: Iterable[str] = (), **numbers: float) -> Finding:
        """One of this rule's."""
        plain = {name: float(value) for name, value in numbers.items()}  # they may be numpy's
        return Finding(type(self).__name__, int(step), what, self.why, self.advice, tuple(map(str, where)), plain)


class TensorRule(Rule):
    """A rule about tensors: it is shown the steps that have statistics, by :meth:`look`."""

    when: ClassVar = ("tensors",)

    def update(self, seen: Seen) -> Iterable[Finding] | None:
        return None if seen.tensors is None else self.look(seen, seen.tensors)

    def look(self, seen: Seen, tensors: Tensors) -> Iterable[Finding]:
        """What is wrong with them at this step."""
        raise NotImplementedError(f"{type(self).__name__} must say in look() what is wrong")


class Watch:
    """Several rules over the steps of a run; ``failed`` is told of a rule that was switched off, and why."""

    def __init__(self, rules: Iterable[Rule], failed: Callable[[str], Any]) -> None:
        self._rules, self._failed = list(rules), failed
        self._of_every_step = [rule for rule in self._rules if "step" in rule.when]
        self._wrong: dict[int, set[str]] = {}

    def update(self, seen: Seen) -> list[Finding]:
        """New findings of this step."""
        return self._looked(self._shown(seen), [seen])

    def update_plain(self, several: Sequence[Seen]) -> list[Finding]:
        """New findings of steps without tensors, scores and observations, in their order."""
        return self._looked(self._of_every_step, several)

    def _looked(self, rules: Iterable[Rule], several: Sequence[Seen]) -> list[Finding]:
        """Rule after rule over all steps, which is quicker than step after step; findings in the order of the steps."""
        found: list[tuple[int, Finding]] = []
        for rule in list(rules):
            update, before = rule.update, id(rule) in self._wrong
            place = 0
            try:
                for place, seen in enumerate(several):
                    wrong = update(seen)
                    if wrong is not None and (before or wrong != ()):  # which is quick to see
                        found += [(place, each) for each in self._new(rule, list(wrong))]
                        before = id(rule) in self._wrong
            except Exception as error:  # noqa: BLE001 - a rule may be anyone's
                self._switch_off(rule, several[place].step, error)
        return [each for _, each in sorted(found, key=lambda pair: pair[0])]

    def _shown(self, seen: Seen) -> list[Rule]:
        there = {"step", *seen.observed}
        there |= {"tensors"} if seen.tensors is not None else set()
        there |= {"scores"} if seen.scores else set()
        return [rule for rule in self._rules if not there.isdisjoint(rule.when)]

    def _switch_off(self, rule: Rule, step: int, error: Exception) -> None:
        self._rules = [each for each in self._rules if each is not rule]
        self._of_every_step = [each for each in self._of_every_step if each is not rule]
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        self._failed(f"rule {type(rule).__name__} failed at step {step} and is switched off ({reason})")

    def _new(self, rule: Rule, found: list[Finding]) -> Iterator[Finding]:
        before = self._wrong.pop(id(rule), set())
        now = {place for each in found for place in each.where or ("",)}
        if now:
            self._wrong[id(rule)] = now
        for each in found:
            fresh = tuple(place for place in each.where or ("",) if place not in before)
            if fresh:
                yield replace(each, where=tuple(filter(None, fresh)))
