"""Findings put in order: which matter most, and those of one rule together.

groups = grouped(run.findings())  # the group that was heard of last comes last
by_gravity(groups)[0].rule  # "ExplodingTensor"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dltrain.debugger.findings import Finding

LEVELS = ("broken", "learning", "data", "cost")
"""What is at stake, the gravest first: the training itself, how well it learns, what it learns from, what it costs."""

_BROKEN = ("ExplodingTensor", "ReplicaDivergence", "LossScaleCollapse", "VanishingGradient", "AllZero")
_DATA = ("ClassImbalance", "Confusion", "CheckInputImages", "NLPSequenceRatio", "LabelNoise")
_COST = (
    "StalledTrainingRule",
    "Straggler",
    "DataWait",
    "PipelineBubble",
    "GPUMemoryIncrease",
    "CPUBottleneck",
    "IOBottleneck",
    "LowGPUUtilization",
    "LoadBalancing",
    "BatchSize",
    "Dataloader",
    "StepOutlier",
    "MaxInitializationTime",
)


class Group(NamedTuple):
    """All findings of one rule, in the order of their steps; at least one."""

    rule: str
    findings: list[Finding]

    @property
    def level(self) -> str:
        """One of :data:`LEVELS`; rules that are not dltrain's own are taken to be about learning."""
        known = (("broken", _BROKEN), ("data", _DATA), ("cost", _COST))
        return next((level for level, rules in known if self.rule in rules), "learning")


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """By rule; the rule that found something last comes last."""
    rules: dict[str, list[Finding]] = {}
    for each in findings:
        rules.setdefault(each.rule, []).append(each)
    return sorted((Group(rule, some) for rule, some in rules.items()), key=lambda group: group.findings[-1].step)


def by_gravity(groups: Sequence[Group]) -> list[Group]:
    """The gravest first: by level, by the order of rules in it, and by which came first."""
    order = [*_BROKEN, *_COST]

    def key(group: Group) -> tuple[int, int, int]:
        place = order.index(group.rule) if group.rule in order else len(order)
        return LEVELS.index(group.level), place, group.findings[0].step

    return sorted(groups, key=key)
