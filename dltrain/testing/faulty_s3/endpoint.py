"""The server in a process of its own, and the wires to it.

with FaultyS3(folder="/data/shards", faults=Faults(bandwidth=60e6)) as server:
    subprocess.run(command, env={**os.environ, **server.variables})
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from dltrain.errors import UserError
from dltrain.testing.faulty_s3.faults import Faults
from dltrain.testing.faulty_s3.records import Record
from dltrain.testing.s3 import speaking_to, variables

_STOP_SECONDS = 5


class FaultyS3:
    """Runs while the ``with`` block does; this process and those it starts talk to it by the environment.

    Objects lie in ``folder/BUCKET/KEY``, in a folder that is removed at the end if none is given; files already there
    are objects. Raises ``UserError`` for a folder that does not exist.
    """

    def __init__(
        self, buckets: Sequence[str] = ("data",), folder: str | Path | None = None, faults: Faults | None = None
    ) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder} for the S3 server to serve; make it first")
        self._words = [f"--bucket={bucket}" for bucket in buckets]
        self._words += [] if folder is None else [f"--folder={folder}"]
        self._faults = faults
        self._port = 0
        self._open = ExitStack()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to speak to this endpoint."""
        return variables(self.url)

    @property
    def folder(self) -> Path:
        """Where the buckets lie."""
        return Path(self._ask("GET", "folder"))

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self._port = opened.enter_context(_process(self._words))
            if self._faults is not None:
                self.set(self._faults)
            opened.enter_context(speaking_to(self.variables))
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def set(self, faults: Faults) -> None:
        """From the next request on these faults, and no others; ``Faults()`` ends all."""
        self._ask("PUT", "faults", asdict(faults))

    def requests(self) -> list[Record]:
        """What was asked since the start, or since ``forget``."""
        return [Record(**record) for record in self._ask("GET", "requests")]

    def counts(self) -> Counter[str]:
        """Requests by method: GET, HEAD, PUT, DELETE, POST, LIST."""
        return Counter(record.method for record in self.requests())

    def forget(self) -> None:
        """Begin the record of requests anew."""
        self._ask("DELETE", "requests")

    def uploads(self) -> list[tuple[str, str]]:
        """Bucket and key of each multipart upload that was begun and neither completed nor aborted."""
        return [(bucket, key) for bucket, key in self._ask("GET", "uploads")]

    def _ask(self, method: str, what: str, value: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request(method, f"/-/{what}", None if value is None else json.dumps(value))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise UserError(f"the S3 server refused {what}: {body.decode().strip()}")
        return json.loads(body) if body else None


@contextmanager
def _process(words: Sequence[str]) -> Iterator[int]:
    """The server's process, ended with the block or with this process; gives its port."""
    command = [sys.executable, "-m", "dltrain.testing.faulty_s3", "--until-stdin-closes", *words]
    # A session of its own: Ctrl-C is for the client, which may still have objects to write.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        if not url:
            raise UserError(f"the S3 server did not start (exit status {process.wait()}); its message stands above")
        yield int(url.rpartition(":")[2])
    finally:
        process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
