"""Words for the user: from rank 0 alone, on standard error, so that standard output stays for results."""

from __future__ import annotations

import sys

from dltrain.runtime.environment import Environment


def say(environment: Environment, message: str) -> None:
    """A line of progress, once for all ranks."""
    if environment.is_main:
        print(message, file=sys.stderr, flush=True)


def warn(environment: Environment, message: str) -> None:
    """A line the user should act on, once for all ranks."""
    say(environment, f"warning: {message}")
