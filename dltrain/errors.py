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


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of a sentence that names the closest candidate, or lists all when none is close."""
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "there are: " + ", ".join(known) if known else "there are none"
