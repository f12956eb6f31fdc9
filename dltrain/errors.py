"""The one exception for a mistake the user can mend.

Its message is a sentence: what was found, where, and what to change. The command line prints it without a traceback
and exits with ``EXIT_USER_ERROR``; anything else that escapes is a fault of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2
"""Exit status after a :class:`UserError`."""

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop, saved its state and can be resumed (``EX_TEMPFAIL`` of sysexits.h)."""


class UserError(ValueError):
    """The user's own mistake, told in one sentence."""


EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C with nothing saved."""

EXIT_UNFOLLOWED = 69
"""Exit status where a job was started elsewhere, and what became of it is not known (``EX_UNAVAILABLE``)."""

CLOSE = 0.6
"""Least likeness of a name that is offered in the place of another."""


CLOSER = 0.75
"""The same of a last part alone, which is short: ``epochs`` does not mean ``optim.eps``."""

LISTED, OFFERED = 20, 3
"""Most candidates that are listed, and that are offered."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of a sentence that names the closest candidate (or those that are abbreviated so, or have a name without
    dots for their last part), or when none is close lists those that are closer than others."""
    known = sorted(candidates)
    likeness = {each: _likeness(name, each) for each in known}
    near = sorted(known, key=lambda each: -likeness[each])
    most = max(likeness.values(), default=0.0)
    if most >= CLOSE:
        equal = OFFERED if _is_last(name, near[0]) else 1
        short = [each for each in near if likeness[each] > 1]
        meant = short[:OFFERED] or [each for each in near if likeness[each] == most][:equal]
        return f"did you mean {' or '.join(map(repr, meant))}?"
    near.sort(key=lambda each: (-likeness[each], -_ratio(name, each)))
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"there are: {', '.join(sorted(near[:LISTED]))}{more}" if known else "there are none"


def _is_last(name: str, candidate: str) -> bool:
    """Whether a name can only be the last part of the candidate's."""
    return "." not in name and "." in candidate


def _likeness(name: str, candidate: str) -> float:
    """From 0 to 1, and above it for a candidate that the name abbreviates, as ``optim.lr`` does
    ``optim.learning_rate``. Of dotted names the last parts must be alike by themselves: what comes before is long.
    To a name without dots they alone count: ``batch_size`` is the end of ``data.global_batch_size``."""
    if _is_last(name, candidate):
        part = candidate.rpartition(".")[2]
        if part == name:
            return 3
        if part.endswith(f"_{name}"):
            return 2 + _ratio(name, part) / 2
        found = _likeness(name, part)
        return found if found >= CLOSER or name in part else found * CLOSE
    (head, _, last), (other_head, _, other_last) = name.rpartition("."), candidate.rpartition(".")
    whole = _ratio(name, candidate)
    if head == other_head or _ratio(head, other_head) >= CLOSE:
        initials = "".join(word[:1] for word in other_last.split("_"))
        if 1 < len(last) < len(other_last) and initials.endswith(last):
            return 1 + whole
        if len(last) > 2 and last in other_last:
            return max(whole, CLOSE)
    return min(whole, _ratio(last, other_last))


def _ratio(name: str, candidate: str) -> float:
    return difflib.SequenceMatcher(None, candidate, name).ratio()
