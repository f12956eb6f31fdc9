"""How far a long work on shards has come: a live bar on a terminal, a line now and then elsewhere; on standard error.

with Progress("indexing") as progress:
    run_jobs(work, jobs, workers, progress)
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

_LINE_SECONDS = 5.0


class Progress:
    """Counts jobs, samples and bytes, and shows them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._jobs = self._done = self._samples = self._bytes = 0
        self._bar = _Bar(what) if sys.stderr.isatty() else None
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, jobs: int) -> None:
        self._jobs = jobs

    def more(self, samples: int, size: int) -> None:
        self._samples += samples
        self._bytes += size
        self._show()

    def job_done(self) -> None:
        self._done += 1
        self._show()

    def _show(self) -> None:
        text = f"{self._samples:,} samples, {size_text(self._bytes)}, {size_text(self._rate())}/s"
        if self._bar is not None:
            self._bar.update(self._done, self._jobs, text)
        elif time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._what}: {self._done} of {self._jobs} parts, {text}", file=sys.stderr, flush=True)

    def _rate(self) -> float:
        return self._bytes / max(1e-3, time.monotonic() - self._began)


class _Bar:
    def __init__(self, what: str) -> None:
        from rich.console import Console  # slow to import, and of no use without a terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn(f"[bold]{what}"), BarColumn(bar_width=20), MofNCompleteColumn())
        text, console = TextColumn("{task.fields[text]}"), Console(stderr=True)
        self._progress = RichProgress(*columns, text, console=console, redirect_stdout=False)
        self._task = self._progress.add_task("", total=None, text="")
        self._progress.start()

    def update(self, done: int, jobs: int, text: str) -> None:
        self._progress.update(self._task, completed=done, total=jobs or None, text=text)

    def stop(self) -> None:
        self._progress.stop()


def size_text(size: float) -> str:
    """Bytes as one reads them: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
