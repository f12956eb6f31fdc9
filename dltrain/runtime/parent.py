"""A process that is told to stop when the one above it ends, however that does. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def stop_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends; on Linux alone."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended in between
            os.kill(os.getpid(), signal.SIGTERM)
