"""What the rules found: a sentence for the top of the page, and a card for each rule.

verdict(groups, ["VanishingGradient", "LossSpike"])  # "Nothing was found by the 2 rules that watched: ..."
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from dltrain.debugger.findings import Finding
from dltrain.debugger.report.page import folded
from dltrain.debugger.seen import shown
from dltrain.debugger.severity import Group, by_gravity

_AT_STAKE = {
    "broken": "the training itself is broken",
    "learning": "it learns less well than it could",
    "data": "about the data",
    "cost": "it costs more time than it should",
}

_MOST = 30
"""Later findings of a rule that a card holds."""


def verdict(groups: Sequence[Group], watched: Sequence[str]) -> str:
    """A sentence in plain words: how many findings and the gravest, or that there are none and who watched."""
    if not groups:
        some = f"the {len(watched)} rules that watched: {', '.join(watched)}" if watched else "any rule; none watched"
        return f"Nothing was found by {some}."
    worst = by_gravity(groups)[0]
    first = worst.findings[0]
    count = sum(len(group.findings) for group in groups)
    many = "1 finding" if count == 1 else f"{count} findings of {_rules(len(groups))}, of which the gravest"
    sentence = f"{many}: {first.rule} at step {first.step} ({_AT_STAKE[worst.level]}): {first.what}."
    earliest = min((group.findings[0] for group in groups), key=lambda finding: finding.step)
    return sentence if earliest.step == first.step else f"{sentence} {_before(earliest)}"


def _before(earliest: Finding) -> str:
    return f"The first that was heard of was {earliest.rule}, at step {earliest.step}."


def verdict_html(groups: Sequence[Group], watched: Sequence[str], ended: str) -> str:
    """The same with how the run ended."""
    level = by_gravity(groups)[0].level if groups else ""
    told = verdict(groups, watched)
    strong, colon, names = (told, "", "") if groups else told.partition(": ")
    text = f"<b>{html.escape(strong)}</b>{html.escape(colon + names)}"
    return f'<p class="verdict {level}">{text}<br>{html.escape(ended)}</p>'


def cards(groups: Sequence[Group]) -> list[str]:
    """One of each rule, the gravest first, numbered as in the plots."""
    return [_card(number, group) for number, group in enumerate(groups, 1)]


def _card(number: int, group: Group) -> str:
    first, *later = group.findings
    head = f"<span class=number>{number}</span>{html.escape(group.rule)}"
    stake = f"<p class=muted>step {first.step}; {_AT_STAKE[group.level]}</p>"
    parts = [f"<h3>{head}</h3>", stake, f"<p>{html.escape(_sentence(first.what))}</p>"]
    if first.why:
        parts.append(f"<p><b>Why it matters.</b> {html.escape(first.why)}</p>")
    if first.advice:
        parts.append(f"<p><b>What to try.</b> {html.escape(first.advice)}</p>")
    parts.append(_where(first))
    if later:
        parts.append(_later(later))
    return f'<div class="card {group.level}">{"".join(parts)}</div>'


def _where(finding: Finding) -> str:
    """Where it is, but for a few that the sentence names already."""
    if len(finding.where) <= 3:
        return ""
    names = ", ".join(f"<code>{html.escape(name)}</code>" for name in finding.where)
    return folded(f"where ({len(finding.where)})", f"<p>{names}</p>")


def _later(later: Sequence[Finding]) -> str:
    times = "once more" if len(later) == 1 else f"{len(later)} times more"
    steps = ("step " if len(later) == 1 else "steps ") + shown(str(each.step) for each in later)
    rows = "".join(f"<p>step {each.step}: {html.escape(_sentence(each.what))}</p>" for each in later[:_MOST])
    rest = f"<p class=muted>and {len(later) - _MOST} more</p>" if len(later) > _MOST else ""
    return folded(f"{times}, at {steps}", rows + rest)


def _sentence(text: str) -> str:
    """With a capital, but where a name comes first, and with a full stop."""
    first = text.split(" ", 1)[0]
    start = text[:1].upper() if first.isalpha() else text[:1]
    return start + text[1:] + ("" if text.endswith(".") else ".")


def _rules(count: int) -> str:
    return "1 rule" if count == 1 else f"{count} rules"
