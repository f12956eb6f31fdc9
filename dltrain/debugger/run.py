"""Reading a run's statistics afterwards, or while it goes on; in the words of SageMaker Debugger's trials.

run = open_run("runs/mine")
run.tensor_names(kind="gradients")
run.tensor("gradient/head.weight").reductions("abs_mean")  # an array over all of its steps
list(run.judge(["LossNotDecreasing"]))  # findings, as if the rules had been there
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dltrain import storage
from dltrain.debugger.findings import Finding
from dltrain.debugger.reductions import Array, reduce
from dltrain.debugger.rules.base import Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.seen import Index, Seen, Tensors, kind_of
from dltrain.debugger.smdebug.folder import is_smdebug
from dltrain.debugger.smdebug.run import ImportedRun
from dltrain.debugger.store import SCALARS, Segment, read_folder
from dltrain.errors import UserError, nearest


@dataclass(frozen=True)
class SavedTensor:
    """A tensor's moments, float64 [steps, 9], at the steps where there are any."""

    name: str
    steps: list[int]
    moments: Array

    def reductions(self, name: str) -> Array:
        """One reduction at all steps, float64 [steps]."""
        return reduce(name, self.moments)

    def reduction_value(self, step: int, name: str) -> float:
        """One reduction at one step. Raises :class:`UserError` where there is none."""
        if step not in self.steps:
            raise UserError(f"{self.name} has no statistics of step {step}; it has those of {_some(self.steps)}")
        return float(reduce(name, self.moments[self.steps.index(step)]))


class SavedRun:
    """What a run has written so far; :meth:`refresh` reads what came since."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.refresh()

    def refresh(self) -> None:
        """Read the statistics anew."""
        scalars, segments = read_folder(storage.join(self._url, "debugger/statistics"))
        self._segments: list[Segment] = list(segments)
        self._scalars = scalars

    def steps(self) -> list[int]:
        """Steps with statistics of tensors."""
        return [int(step) for segment in self._segments for step in segment.steps]

    def scalars(self, name: str) -> tuple[Array, Array]:
        """Steps, and one of :data:`~dltrain.debugger.store.SCALARS` at each, such as the loss: of every step."""
        if name not in SCALARS:
            raise UserError(f"there is no scalar {name!r}; {nearest(name, SCALARS)}")
        return self._scalars[:, 0], self._scalars[:, 1 + SCALARS.index(name)]

    def tensor_names(self, kind: str = "", regex: str = "") -> list[str]:
        """Names of tensors: all, or those of a kind, or those that the expression is found in."""
        names = dict.fromkeys(name for segment in self._segments for name in segment.names)
        return [name for name in names if (not kind or kind_of(name) == kind) and re.search(regex, name)]

    def tensor(self, name: str) -> SavedTensor:
        """A tensor by name. Raises :class:`UserError` where there is none."""
        found = [segment for segment in self._segments if name in segment.names]
        if not found:
            raise UserError(f"{self._url} has no tensor {name!r}; {nearest(name, self.tensor_names())}")
        steps = [int(step) for segment in found for step in segment.steps]
        return SavedTensor(name, steps, np.concatenate([each.values[:, each.names.index(name)] for each in found]))

    def wait_for_steps(self, steps: Iterable[int], timeout: float = 600.0) -> None:
        """Return once there are statistics of all these steps. Raises :class:`UserError` after ``timeout`` seconds."""
        wanted, until = set(steps), time.monotonic() + timeout
        while not wanted <= set(self.steps()):
            if time.monotonic() > until:
                raise UserError(f"{self._url} has no statistics of steps {_some(sorted(wanted - set(self.steps())))}")
            time.sleep(1.0)
            self.refresh()

    def findings(self) -> list[Finding]:
        """What its rules found while it was trained."""
        lines = _lines(storage.join(self._url, "debugger/findings.jsonl"))
        return [Finding.of(line) for line in lines]

    def judge(self, rules: Iterable[str]) -> Iterator[Finding]:
        """What these rules find in it now, and would have found then."""
        told: list[str] = []
        watch = Watch(build(rules), told.append)
        for seen in self.history():
            yield from watch.update(seen)
            if told:
                raise UserError(told[0])

    def history(self) -> Iterator[Seen]:
        """All that was seen, in the order of the steps; scores after the step that they are of."""
        tensors = {
            int(step): Tensors(index, rows)
            for segment in self._segments
            for index in [Index(segment.names)]
            for step, rows in zip(segment.steps, segment.values, strict=True)
        }
        scores = {line["step"]: line for line in _lines(storage.join(self._url, "metrics.jsonl")) if _is_score(line)}
        for step, *values in self._scalars.tolist():
            yield Seen(int(step), tensors=tensors.get(int(step)), **dict(zip(SCALARS, values, strict=True)))
            if step in scores:
                line = scores[step]
                found = {name.removeprefix("evaluation/"): value for name, value in line.items() if name != "kind"}
                yield Seen(int(step), line["time"], scores=found)


def open_run(url: str) -> SavedRun | ImportedRun:
    """The run, or the trial of SageMaker Debugger's, in a folder or under a URL.

    Raises :class:`UserError` where it has no statistics.
    """
    return ImportedRun(str(url)) if is_smdebug(str(url)) else SavedRun(str(url))


def _is_score(line: dict[str, Any]) -> bool:
    return line.get("kind") == "evaluation"


def _lines(url: str) -> list[dict[str, Any]]:
    """Of JSON, those that are whole; none where there is no file."""
    if not storage.exists(url):
        return []
    text = storage.read(url).decode()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (f", ... {steps[-1]}" if len(steps) > 8 else "")
