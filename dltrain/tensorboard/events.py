"""A file of events, written by this process without a thread, so that what fails fails here; and its copy on S3.

events = Events(Path("runs/mine/tensorboard"), copy_to="s3://bucket/tensorboard/mine")
events.open(step=0)
events.add(summary.scalar("loss/train", 0.5), step=1)
events.close()
events.copy(wait=True)
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from dltrain import storage

_EVERY = 2.0
"""Seconds between moments at which what was written can be seen by readers, at least."""


def place_of(wanted: str, run: Path) -> tuple[Path, str]:
    """The local folder for events of the run's folder ``run``, and the URL they are copied to, or nothing.

    ``wanted`` is a local folder or an URL, where runs have a folder each; without it the run's own is taken.
    """
    local = storage.local_path(wanted) if wanted else run / "tensorboard"
    if local is None:
        return run / "tensorboard", storage.join(wanted, run.name)
    return (local / run.name if wanted else local), ""


class Events:
    """Events in ``folder``, and other files beside them; all are copied to the URL ``copy_to``, if there is one.

    Raises ``OSError`` where the folder cannot be written.
    """

    def __init__(self, folder: Path, copy_to: str = "") -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        self._shown = 0.0
        self._copy = Copy(folder, copy_to) if copy_to else None

    def open(self, step: int) -> None:
        """Begin a file at ``step``: of steps after it, which will be done again, TensorBoard hides what others say."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self.folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"), 0)
        if step:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)
        self.show()

    def add(self, summary: Summary, step: int) -> None:
        """Scalars, images, texts and the like, as torch.utils.tensorboard.summary makes them."""
        self._write(Event(summary=summary), step)

    def add_graph(self, graph: GraphDef) -> None:
        """The model's graph."""
        self._write(Event(graph_def=graph.SerializeToString()), 0)

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Files by their paths in the folder."""
        for name, data in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            storage.write(str(self.folder / name), data)

    def show(self) -> None:
        """Let readers see what was written."""
        if self._file is not None:
            self._file.flush()
            self._shown = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def copy(self, wait: bool = False) -> None:
        """Begin to copy what can be seen; or, when no more will come, copy it and ``wait``. Raises what that, or the
        copy before, ran into."""
        if self._copy is not None:
            (self._copy.end if wait else self._copy.begin)()

    def _write(self, event: Event, step: int) -> None:
        if self._file is None:
            raise AssertionError("events are added once the file was opened")
        event.step, event.wall_time = step, time.time()
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._shown > _EVERY:
            self.show()


class Copy:
    """A folder's files below a URL, brought up to date by a thread: nobody waits for the network but :meth:`end`."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._there: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard-copy")
        self._running: Future[None] | None = None

    def begin(self) -> None:
        """Copy what is new, unless that is being done. Raises what the last copy ran into."""
        if self._running is not None and not self._running.done():
            return
        before, self._running = self._running, None
        if before is not None:
            before.result()
        self._running = self._thread.submit(self._bring)

    def end(self) -> None:
        """Bring everything, once what runs has ended. Raises what that ran into."""
        self._thread.shutdown()
        self._bring()

    def _bring(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            name, stat = path.relative_to(self._folder).as_posix(), path.stat()
            if path.is_file() and self._there.get(name) != (stat.st_size, stat.st_mtime_ns):
                storage.upload(path, storage.join(self._url, name))
                self._there[name] = (stat.st_size, stat.st_mtime_ns)
