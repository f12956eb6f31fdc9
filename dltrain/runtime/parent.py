"""A process that is told to stop when the one above it ends, however that does. Imports no torch."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
