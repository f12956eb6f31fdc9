"""Words for the user: from rank 0 alone, on standard error, so that standard output stays for results."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from dltrain.runtime.environment import Environment


def say(environment: Environment, message: str) -> None:
    """A line of progress, once for all ranks."""
    if environment.is_main:
        print(message, file=sys.stderr, flush=True)


def warn(environment: Environment, message: str) -> None:
    """A line the user should act on, once for all ranks."""
    say(environment, f"warning: {message}")


class _Lasting(io.TextIOWrapper):
    """A stream whose reader may go away: what is printed from then on is lost, and nothing else."""

    def write(self, text: str) -> int:
        return self._tried(lambda: super(_Lasting, self).write(text)) or len(text)

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, write: Callable[[], int | None]) -> int | None:
        try:
            return write()
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:  # for what libraries print, too
                os.dup2(nowhere.fileno(), self.fileno())
        return None


def outlive_readers() -> None:
    """Go on where nobody reads standard output and error any more: SageMaker's toolkit reads them, and on a signal to
    stop it is the first to die."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            lasting = _Lasting(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, lasting)
