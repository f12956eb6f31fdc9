"""What lies where in a folder that smdebug wrote: of which tensors, steps and workers there is something, so far.

    folder = Folder("s3://bucket/job/debug-output")
    folder.complete  # steps, each with its mode and the step of that mode
    folder.places["gradient/conv1.weight"][500]["worker_0"]["abs_mean"]  # a record in a file

A step of a worker counts when its index can be read and its event file is as long as the index says. Index files do not
change, so :meth:`Folder.refresh` reads only those that came since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dltrain import storage
from dltrain.debugger.smdebug.events import Values, read_record
from dltrain.debugger.smdebug.names import canonical
from dltrain.errors import UserError

REDUCTIONS = "smdebug/reductions/"
"""Begins the names of numbers that smdebug computed before it wrote: ``smdebug/reductions/abs_mean/<tensor>``."""

VALUE = ""
"""The form of a tensor itself, beside the names of reductions."""

_READERS = 16
"""Files that are read at a time."""

_SMALL, _KEPT = 1 << 20, 1 << 28
"""Bytes of a file that is read whole, and of all that are held."""


class Place(NamedTuple):
    """Of a record: ``length`` bytes from ``start``."""

    url: str
    start: int
    length: int


class At(NamedTuple):
    """What a step is: train, eval, predict, or global where no mode was set; ``step`` counts those of the mode."""

    mode: str
    step: int


Forms = dict[str, Place]
"""By :data:`VALUE` or a reduction's name."""


@dataclass
class Folder:
    """Of a path or URL; tensors bear canonical names. Raises :class:`UserError` where there is none."""

    url: str
    workers: list[str] = field(default_factory=list)
    steps: dict[int, At] = field(default_factory=dict)
    complete: list[int] = field(default_factory=list)
    """Steps that all workers wrote, or that come before such a one, or all where the training has ended."""
    places: dict[str, dict[int, dict[str, Forms]]] = field(default_factory=dict)
    """By tensor, step and worker."""
    original: dict[str, str] = field(default_factory=dict)
    """Names as smdebug wrote them, by canonical ones."""
    collections: dict[str, tuple[set[str], list[str]]] = field(default_factory=dict)
    """Original names of tensors, and regular expressions of some, by collection."""
    _expected: int = 1
    """Workers that write."""
    _written: dict[int, set[str]] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)
    _ends: dict[str, int] = field(default_factory=dict)
    """Bytes of event files."""
    _kept: dict[str, bytes | bytearray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Look at what was written since."""
        self._find_collections()
        there = storage.listing(storage.join(self.url, "events"))
        sizes = {each.rpartition("/")[2]: _size(each) for each in there}
        urls = {each.rpartition("/")[2]: each for each in there}
        new = [each for each in storage.listing(storage.join(self.url, "index")) if each not in self._read]
        for url, data in zip(new, _all(new), strict=True):
            index = _index(data)
            name = index["meta"]["event_file_name"].rpartition("/")[2] if index else ""
            if index and name in urls and _end(index) <= sizes[name]:
                self._read.add(url)
                self._add(url, index, urls[name])
        self._tell_complete()

    def read(self, places: Iterable[Place]) -> list[tuple[float, Values]]:
        """Seconds and values of each. Raises :class:`UserError` for what cannot be read."""
        wanted = list(places)
        self._keep(dict.fromkeys(each.url for each in wanted))
        large = [each for each in wanted if each.url not in self._kept]
        read = dict(zip(large, _all([each.url for each in large], large), strict=True))
        return [read_record(read[each] if each in read else self._part(each), each.url) for each in wanted]

    def _keep(self, urls: Iterable[str]) -> None:
        """Read small files whole: what is asked of one tensor is mostly asked of the others."""
        if sum(map(len, self._kept.values())) > _KEPT:
            self._kept = {}
        new = [url for url in urls if url not in self._kept and self._ends[url] <= _SMALL]
        self._kept.update(zip(new, _all(new), strict=True))

    def _part(self, place: Place) -> bytes | bytearray:
        return self._kept[place.url][place.start : place.start + place.length]

    def _find_collections(self) -> None:
        found = [each for each in storage.listing(storage.join(self.url, "collections")) if each.endswith(".json")]
        if not found:
            raise UserError(f"{self.url} has no collections/, so it is no folder of smdebug's")
        suffix = "_collections.json"
        self.workers = sorted({each.rpartition("/")[2].removesuffix(suffix) for each in found})
        for data in _all(found):
            tree = _parsed(data) or {}
            self._expected = max(len(self.workers), int(tree.get("_meta", {}).get("num_workers", 1)))
            for name, each in tree.get("collections", {}).items():
                names, expressions = self.collections.setdefault(name, (set(), []))
                names |= {*each.get("tensor_names", ())}
                expressions += [one for one in each.get("include_regex", ()) if one not in expressions]

    def _add(self, url: str, index: dict[str, Any], events: str) -> None:
        number, _, worker = url.rpartition("/")[2].removesuffix(".json").partition("_")
        step = int(number)
        self.steps[step] = At(str(index["meta"]["mode"]).lower(), int(index["meta"]["mode_step"]))
        self._written.setdefault(step, set()).add(worker)
        self._ends[events] = _end(index)
        for each in index.get("tensor_payload") or ():
            form, name = _form(each["tensorname"])
            ours = canonical(name)
            self.original.setdefault(ours, name)
            forms = self.places.setdefault(ours, {}).setdefault(step, {}).setdefault(worker, {})
            forms[form] = Place(events, int(each["start_idx"]), int(each["length"]))

    def _tell_complete(self) -> None:
        steps = sorted(self.steps)
        ended = storage.exists(storage.join(self.url, "training_job_end.ts"))
        last = max((step for step in steps if ended or len(self._written[step]) >= self._expected), default=-1)
        self.complete = [step for step in steps if step <= last]


def is_smdebug(url: str) -> bool:
    """Whether smdebug wrote the folder."""
    found = storage.listing(storage.join(url, "collections"))
    return any(each.endswith("_collections.json") for each in found)


def _form(name: str) -> tuple[str, str]:
    """A reduction's name or :data:`VALUE`, and the tensor's."""
    if not name.startswith(REDUCTIONS):
        return VALUE, name
    form, _, tensor = name.removeprefix(REDUCTIONS).partition("/")
    return form, tensor


def _index(data: bytes | bytearray) -> dict[str, Any] | None:
    """None for one that is not whole yet, or is of shapes alone."""
    tree = _parsed(data)
    return tree if tree and (tree.get("meta") or {}).get("event_file_name") else None


def _parsed(data: bytes | bytearray) -> dict[str, Any] | None:
    try:
        tree = json.loads(data)
    except ValueError:  # half-written
        return None
    return tree if isinstance(tree, dict) else None


def _end(index: dict[str, Any]) -> int:
    return max((each["start_idx"] + each["length"] for each in index.get("tensor_payload") or ()), default=0)


def _size(url: str) -> float:
    """Bytes of a file here; an object elsewhere is whole or not there."""
    path = storage.local_path(url)
    return math.inf if path is None else path.stat().st_size


def _all(urls: list[str], places: list[Place] | None = None) -> Iterator[bytes | bytearray]:
    """The objects, or the parts of them; several at a time where they lie behind a network."""
    starts = [each.start for each in places or ()] or [0] * len(urls)
    stops: list[int | None] = [each.start + each.length for each in places or ()]
    asked = (urls, starts, stops or [None] * len(urls))
    if len(urls) < 2 or not storage.is_remote(urls[0]):
        yield from map(storage.read, *asked)
        return
    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(storage.read, *asked)
