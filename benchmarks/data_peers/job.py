"""What a contestant's process is told, and what it answers. Imports nothing but the standard library.

The process gets one job in JSON as its argument, warms up, and then makes one pass for every line of standard input,
answering each with one line of JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """``module`` is the contestant's in this package; ``work`` its function; ``url`` the folder of its data.

    ``decoder`` is empty for raw members, ``own`` for what the contestant's users get, else a name of ``crops``.
    A pass lasts ``seconds`` or one epoch, whichever is longer. The process may leave files in ``scratch``.
    ``shards`` are the tars' names; ``source`` is the folder that ``write`` converts into the contestant's form.
    ``position`` is where ``resume`` begins; a window has ``steps`` steps.
    """

    module: str
    work: str
    url: str
    scratch: str
    shards: tuple[str, ...] = ()
    decoder: str = ""
    variant: str = ""
    source: str = ""
    seconds: float = 1.0
    epochs: int = 10
    position: int = 0
    steps: int = 512
    batch: int = 64
    workers: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)
