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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any

import numpy as np

from dltrain import storage
from dltrain.debugger.findings import Finding
from dltrain.debugger.histogram_store import NAME as HISTOGRAMS
from dltrain.debugger.histogram_store import read_histograms
from dltrain.debugger.histograms import quantile
from dltrain.debugger.raw import names_of_raw, read_raw
from dltrain.debugger.recorder import EVALUATIONS, FINDINGS, OBSERVATIONS, RAW
from dltrain.debugger.reductions import Array, reduce
from dltrain.debugger.rules.base import Rule, Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.seen import Index, Seen, Tensors, kind_of, numbered
from dltrain.debugger.smdebug.folder import is_smdebug
from dltrain.debugger.smdebug.run import ImportedRun
from dltrain.debugger.store import SCALARS, Segment, read_folder
from dltrain.errors import UserError, nearest

MODES = ("train", "eval")

_OBSERVED = ("losses", "confusion", "replicas", "timeline", "system")
"""Needs of rules that are kept as observations."""

CLIPPED = "clipped/"
"""Gradients as the optimizer had them: their moments follow from those before clipping."""


@dataclass(frozen=True)
class SavedTensor:
    """A tensor's moments, float64 [steps, 9], at the steps where there are any; ``counts`` are its histograms, float64
    [BINS] by step, and ``raw`` reads the tensor itself."""

    name: str
    steps: list[int]
    moments: Array
    counts: dict[int, Array] = field(default_factory=dict)
    raw: Callable[[int], np.ndarray[Any, Any]] | None = None

    def reductions(self, name: str) -> Array:
        """One reduction at all steps, float64 [steps]."""
        return reduce(name, self.moments)

    def reduction_value(self, step: int, name: str) -> float:
        """One reduction at one step. Raises :class:`UserError` where there is none."""
        if step not in self.steps:
            raise UserError(f"{self.name} has no statistics of step {step}; it has those of {numbered(self.steps)}")
        return float(reduce(name, self.moments[self.steps.index(step)]))

    def quantiles(self, share: float) -> Array:
        """Values below which that share of the tensor lies, at the steps of ``counts``: float64 [steps], each within a
        quarter of the true one."""
        if not self.counts:
            raise UserError(f"{self.name} has no histograms; train with --debugger.histograms true")
        return np.array([quantile(counts, share) for counts in self.counts.values()])

    def value(self, step: int) -> np.ndarray[Any, Any]:
        """The tensor itself at a step. Raises :class:`UserError` where it was not kept (``debugger.raw``)."""
        if self.raw is None:
            raise UserError(f"{self.name} was not kept itself; train with --debugger.raw '{re.escape(self.name)}'")
        return self.raw(step)


class SavedRun:
    """What a run has written so far; :meth:`refresh` reads what came since."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = storage.join(url, "debugger")
        self.refresh()

    def refresh(self) -> None:
        """Forget what was read, and read the statistics anew."""
        self._scalars, segments = read_folder(storage.join(self._folder, "statistics"))
        self._segments: dict[str, list[Segment]] = {"train": list(segments), "eval": []}
        evaluations = storage.join(self._folder, EVALUATIONS)
        if storage.listing(evaluations):
            self._segments["eval"] = list(read_folder(evaluations)[1])
        self._histograms: dict[int, dict[str, Array]] | None = None
        self._read: dict[str, list[dict[str, Any]]] = {}
        self._raw: dict[str, list[int]] | None = None
        self._present = {mode: _present(segments) for mode, segments in self._segments.items()}

    def steps(self, mode: str = "train") -> list[int]:
        """Steps with statistics of tensors: of training, or of evaluations after those steps ("eval")."""
        return [int(step) for segment in self._of(mode) for step in segment.steps]

    def modes(self) -> list[str]:
        """ "train", and "eval" where evaluations have statistics."""
        return [mode for mode in MODES if self._segments[mode]]

    def workers(self) -> list[str]:
        """One: statistics are those of all ranks together."""
        return ["all"]

    def segments(self, mode: str = "train") -> list[Segment]:
        """Statistics of all tensors as they are stored."""
        return self._of(mode)

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says of it; nothing where there is none."""
        url = storage.join(self.url, "run.json")
        return dict(json.loads(storage.read(url))) if storage.exists(url) else {}

    def scalars(self, name: str) -> tuple[Array, Array]:
        """Steps, and one of :data:`~dltrain.debugger.store.SCALARS` at each, such as the loss: of every step."""
        if name not in SCALARS:
            raise UserError(f"there is no scalar {name!r}; {nearest(name, SCALARS)}")
        return self._scalars[:, 0], self._scalars[:, 1 + SCALARS.index(name)]

    def tensor_names(self, kind: str = "", regex: str = "", mode: str = "train") -> list[str]:
        """Names of tensors that there are statistics of: all, or those of a kind, or those that the expression is
        found in."""
        self._of(mode)
        names = self._present[mode]
        if kind == "clipped":
            names = [CLIPPED + name.partition("/")[2] for name in names if kind_of(name) == "gradients"]
        return [name for name in names if (not kind or kind_of(name) == kind) and re.search(regex, name)]

    def tensor(self, name: str, mode: str = "train") -> SavedTensor:
        """A tensor by name. Raises :class:`UserError` where there is none."""
        if name.startswith(CLIPPED):
            return self._clipped(name)
        found = [segment for segment in self._of(mode) if name in segment.names]
        if name not in self._present[mode]:
            raise UserError(f"{self.url} has no tensor {name!r}; {nearest(name, self._present[mode])}")
        steps = np.concatenate([segment.steps for segment in found])
        moments = np.concatenate([each.values[:, each.names.index(name)] for each in found])
        there = moments[:, 0] > 0
        counts = (
            {step: some[name] for step, some in self.histograms().items() if name in some} if mode == "train" else {}
        )
        raw = partial(self._raw_of, name) if name in self._raw_names else None
        return SavedTensor(name, steps[there].tolist(), moments[there], counts, raw)

    def histograms(self) -> dict[int, dict[str, Array]]:
        """By step and tensor, float64 [BINS]; empty where none were taken."""
        if self._histograms is None:
            url = storage.join(self._folder, HISTOGRAMS)
            self._histograms = read_histograms(storage.read(url)) if storage.exists(url) else {}
        return self._histograms

    def raw(self, step: int) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
        """Tensors that were kept themselves at a step, and the keys of the samples that those of modules are of."""
        return read_raw(storage.join(self._folder, RAW), step)

    def wait_for_steps(self, steps: Iterable[int], timeout: float = 600.0) -> None:
        """Return once there are statistics of all these steps. Raises :class:`UserError` after ``timeout`` seconds."""
        wanted, until = set(steps), time.monotonic() + timeout
        while not wanted <= set(self.steps()):
            if time.monotonic() > until:
                raise UserError(f"{self.url} has no statistics of steps {numbered(sorted(wanted - set(self.steps())))}")
            time.sleep(1.0)
            self.refresh()

    def findings(self) -> list[Finding]:
        """What its rules found while it was trained."""
        return [Finding.of(line) for line in self._lines(storage.join(self._folder, FINDINGS))]

    def observations(self, kind: str) -> list[tuple[int, Any]]:
        """Steps, and what else was seen at each: "timeline", "system", "confusion", "losses", "replicas"."""
        lines = self._lines(storage.join(self._folder, OBSERVATIONS))
        return [(line["step"], line["value"]) for line in lines if line["kind"] == kind]

    def evaluations(self) -> list[dict[str, Any]]:
        """The scores of each evaluation, with its ``step``."""
        return [line for line in self.metrics() if line.get("kind") == "evaluation"]

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged: each record with its ``kind`` and ``step``."""
        return self._lines(storage.join(self.url, "metrics.jsonl"))

    def judge(self, rules: Iterable[str | Rule]) -> Iterator[Finding]:
        """What these rules find in it now, and would have found then."""
        told: list[str] = []
        words = list(rules)
        made = build(words)
        self._refuse_blind([rule for rule in made if type(rule).__name__ in _named(words)])
        watch = Watch(made, told.append)
        for seen in self.history():
            yield from watch.update(seen)
            if told:
                raise UserError(told[0])

    def history(self) -> Iterator[Seen]:
        """All that was seen, in the order of the steps; scores after the step that they are of."""
        histograms, observed = self.histograms(), self._observed()
        tensors = {
            int(step): Tensors(index, rows, histograms.get(int(step), {}))
            for segment in self._segments["train"]
            for index in [Index(segment.names)]
            for step, rows in zip(segment.steps, segment.values, strict=True)
        }
        scores = {line["step"]: line for line in self.evaluations()}
        for number, *values in self._scalars.tolist():
            step = int(number)
            named = dict(zip(SCALARS, values, strict=True))
            yield Seen(step, tensors=tensors.get(step), observed=observed.get((step, False), {}), **named)
            if step in scores:
                line = scores[step]
                found = {name.removeprefix("evaluation/"): value for name, value in line.items() if name != "kind"}
                yield Seen(step, line["time"], scores=found, observed=observed.get((step, True), {}))

    def _refuse_blind(self, rules: Iterable[Rule]) -> None:
        """Refuse rules that need what this run has not kept: they would find nothing in any run."""
        kept = {line["kind"] for line in self._lines(storage.join(self._folder, OBSERVATIONS))}
        for rule in rules:
            needed = {kind for kind in _OBSERVED if getattr(rule.needs(), kind)}
            if needed and not needed & kept:
                lacks = " and ".join(sorted(needed))
                raise UserError(
                    f"rule {type(rule).__name__} needs {lacks}, which {self.url} has not kept; train with that rule on"
                )

    def _of(self, mode: str) -> list[Segment]:
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}; {nearest(mode, MODES)}")
        return self._segments[mode]

    def _observed(self) -> dict[tuple[int, bool], dict[str, Any]]:
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for line in self._lines(storage.join(self._folder, OBSERVATIONS)):
            found.setdefault((line["step"], line["evaluation"]), {})[line["kind"]] = line["value"]
        return found

    def _clipped(self, name: str) -> SavedTensor:
        before = self.tensor("gradient/" + name.removeprefix(CLIPPED))
        steps, factors = self.scalars("clip")
        by_step = dict(zip(steps.tolist(), factors.tolist(), strict=True))
        factor = np.array([by_step[step] for step in before.steps])
        moments = before.moments.copy()
        for column, power in ((1, 1), (2, 2), (3, 1), (6, 1), (7, 1), (8, 1)):
            moments[:, column] *= factor**power
        return SavedTensor(name, before.steps, moments)

    def _raw_of(self, name: str, step: int) -> np.ndarray[Any, Any]:
        steps = self._raw_names[name]
        if step not in steps:
            raise UserError(f"{name} was not kept itself at step {step}; it was at {numbered(steps)}")
        return self.raw(step)[0][name]

    def _lines(self, url: str) -> list[dict[str, Any]]:
        """Of JSON, those that are whole, as of the last refresh; none where there is no file."""
        if url not in self._read:
            text = storage.read(url).decode() if storage.exists(url) else ""
            self._read[url] = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return self._read[url]

    @property
    def _raw_names(self) -> dict[str, list[int]]:
        if self._raw is None:
            self._raw = names_of_raw(storage.join(self._folder, RAW))
        return self._raw


def _named(rules: Iterable[str | Rule]) -> set[str]:
    """Rules that are asked for by their names."""
    return {word.partition(":")[0] for word in rules if isinstance(word, str)}


def open_run(url: str) -> SavedRun | ImportedRun:
    """The run, or the trial of SageMaker Debugger's, in a folder or under a URL.

    Raises :class:`UserError` where it has no statistics.
    """
    return ImportedRun(str(url)) if is_smdebug(str(url)) else SavedRun(str(url))


def _present(segments: list[Segment]) -> list[str]:
    """Names of tensors that have elements at some step."""
    names: dict[str, None] = {}
    for segment in segments:
        there = np.count_nonzero(segment.values[:, :, 0], axis=0)
        names |= dict.fromkeys(compress(segment.names, there))
    return list(names)
