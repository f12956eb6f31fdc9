"""A trial of SageMaker Debugger's, read as a run of ours: the folder that its hook wrote, here or on S3.

run = open_run("s3://bucket/job/debug-output")  # holds collections/, events/ and index/
run.tensor_names(kind="gradients")  # canonical names: gradient/conv1.weight, not gradient/ResNet_conv1.weight
run.tensor("gradient/conv1.weight", mode="train").reductions("abs_mean")
list(run.judge(["VanishingGradient"]))

Steps are those of the trial, which counts from 0: over all modes, or of one mode where that is named.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dltrain.debugger.findings import Finding
from dltrain.debugger.moments import row_of
from dltrain.debugger.reductions import REDUCTIONS, Array, reduce
from dltrain.debugger.seen import Seen, kind_of, numbered
from dltrain.debugger.smdebug.events import Values
from dltrain.debugger.smdebug.folder import VALUE, At, Folder, Forms, Place
from dltrain.debugger.smdebug.names import canonical
from dltrain.errors import UserError, nearest

_RELATED: dict[str, tuple[str, Callable[[float], float]]] = {
    "variance": ("std", lambda value: value**2),
    "std": ("variance", math.sqrt),
    "abs_variance": ("abs_std", lambda value: value**2),
    "abs_std": ("abs_variance", math.sqrt),
    "l1": ("abs_sum", lambda value: value),
    "abs_sum": ("l1", lambda value: value),
}
"""Reductions that follow from another one."""


@dataclass(frozen=True)
class ImportedTensor:
    """A tensor of one worker at the steps where there is something of it.

    Reductions are those that were kept, which smdebug computed by torch (its ``std`` and ``variance`` divide by one
    less than the count), or else computed of the values as dltrain does; a norm is that of all values in a row.
    """

    name: str
    _forms: dict[int, Forms]
    _folder: Folder

    @property
    def steps(self) -> list[int]:
        """Where there is something of it, in order."""
        return list(self._forms)

    def value(self, step: int) -> Values:
        """The values at a step, in their own shape and dtype. Raises :class:`UserError` where they were not kept."""
        return self._folder.read([self._place(step, VALUE)])[0][1]

    def values(self) -> dict[int, Values]:
        """By step, where they were kept."""
        return {step: values for step, (_, values) in self.written().items()}

    def written(self) -> dict[int, tuple[float, Values]]:
        """Seconds since 1970 and values, by step, where these were kept."""
        there = [step for step, forms in self._forms.items() if VALUE in forms]
        return dict(zip(there, self._folder.read(self._place(step, VALUE) for step in there), strict=True))

    def kept(self, step: int) -> list[str]:
        """Reductions that were kept at a step."""
        return [form for form in self._at(step) if form != VALUE]

    def reduction_value(self, step: int, name: str) -> float:
        """One reduction at one step, kept or computed. Raises :class:`UserError` where there is neither."""
        self._at(step)
        return float(self._reduced([step], name)[0])

    def reductions(self, name: str) -> Array:
        """One reduction at all steps, float64 [steps]. Raises :class:`UserError` where it can be had at none."""
        return self._reduced(self.steps, name)

    def numbers(self) -> dict[int, dict[str, float]]:
        """By step and name, all reductions that were kept."""
        asked = [(step, form) for step in self.steps for form in self.kept(step)]
        read = self._folder.read(self._place(*each) for each in asked)
        found: dict[int, dict[str, float]] = {step: {} for step in self.steps}
        for (step, form), (_, values) in zip(asked, read, strict=True):
            found[step][form] = float(values)
        return found

    def can(self, name: str) -> bool:
        """Whether a reduction was kept, or can be computed, at every step."""
        return all(_form_for(name, forms) is not None for forms in self._forms.values())

    def _reduced(self, steps: list[int], name: str) -> Array:
        kept = {form for forms in self._forms.values() for form in forms if form != VALUE}
        if name not in REDUCTIONS and name not in kept:
            raise UserError(f"there is no reduction {name!r}; {nearest(name, {*REDUCTIONS, *kept})}")
        forms = [_form_for(name, self._at(step)) for step in steps]
        for step, form in zip(steps, forms, strict=True):
            if form is None:
                raise UserError(f"{self.name} has no {name} at step {step}: {_there_is(self.kept(step))}")
        places = [self._place(step, form or VALUE) for step, form in zip(steps, forms, strict=True)]
        read = self._folder.read(places)
        numbers = [_number(name, form or VALUE, each[1]) for form, each in zip(forms, read, strict=True)]
        return np.array(numbers, dtype=np.float64)

    def _place(self, step: int, form: str) -> Place:
        forms = self._at(step)
        if form not in forms:
            raise UserError(f"the values of {self.name} at step {step} were not kept: {_there_is(self.kept(step))}")
        return forms[form]

    def _at(self, step: int) -> Forms:
        if step not in self._forms:
            raise UserError(f"{self.name} has nothing of step {step}; it has {numbered(self.steps)}")
        return self._forms[step]


class ImportedRun:
    """What smdebug wrote into a folder so far; :meth:`refresh` looks at what came since."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._folder = Folder(url)

    def refresh(self) -> None:
        """Look at what was written since."""
        self._folder.refresh()

    def workers(self) -> list[str]:
        """Of all that wrote."""
        return self._folder.workers

    def modes(self) -> list[str]:
        """Of train, eval, predict and, where no mode was set, global."""
        return sorted({at.mode for at in self._folder.steps.values()})

    def steps(self, mode: str = "") -> list[int]:
        """Steps that are complete: over all modes, or of one, by its own count."""
        return [self._number(step, mode) for step in self._steps_of(mode)]

    def collections(self) -> list[str]:
        """Names of collections, such as losses."""
        return sorted(self._folder.collections)

    def tensor_names(self, kind: str = "", regex: str = "", collection: str = "") -> list[str]:
        """Names of tensors: all, or those of a kind, or those that the expression is found in, or of a collection."""
        if collection and collection not in self._folder.collections:
            raise UserError(f"{self._url} has no collection {collection!r}; {nearest(collection, self.collections())}")
        return [
            name
            for name in sorted(self._folder.places)
            if (not collection or self._belongs(name, collection)) and (not kind or self.kind_of(name) == kind)
            and re.search(regex, name)
        ]  # fmt: skip

    def kind_of(self, name: str) -> str:
        """weights, gradients, activations (what modules return), inputs (what they take in), losses or scalar."""
        if "losses" in self._folder.collections and self._belongs(name, "losses"):
            return "losses"
        return kind_of(name)

    def tensor(self, name: str, worker: str = "", mode: str = "") -> ImportedTensor:
        """A tensor by its canonical name, or the one it had; of the first worker that wrote it, or the one named.

        With ``mode`` its steps are those of the mode. Raises :class:`UserError` for what there is not.
        """
        found = name if name in self._folder.places else canonical(name)
        if found not in self._folder.places:
            raise UserError(f"{self._url} has no tensor {name!r}; {nearest(name, self.tensor_names())}")
        if worker and worker not in self.workers():
            raise UserError(f"{self._url} has no worker {worker!r}; {nearest(worker, self.workers())}")
        places = self._folder.places[found]
        mine = {
            self._number(step, mode): places[step][worker or min(places[step])]
            for step in self._steps_of(mode)
            if step in places and (not worker or worker in places[step])
        }
        return ImportedTensor(found, mine, self._folder)

    def scalars(self, name: str) -> tuple[Array, Array]:
        """Steps, and a number at each: the loss in training, or what the script saved by ``save_scalar``."""
        found = self._losses() if name == "loss" else [f"scalar/{name}"]
        known = ["loss", *(each.partition("/")[2] for each in self.tensor_names(regex="^scalar/"))]
        if not found or found[0] not in self._folder.places:
            raise UserError(f"{self._url} has no scalar {name!r}; {nearest(name, known)}")
        values = self.tensor(found[0]).values()
        training = [step for step in values if self.at(step).mode in ("train", "global")]
        return np.array(training, dtype=np.float64), np.array([float(values[step].mean()) for step in training])

    def wait_for_steps(self, steps: Iterable[int], mode: str = "", timeout: float = 600.0) -> None:
        """Return once all these are complete. Raises :class:`UserError` after ``timeout`` seconds."""
        wanted, until = set(steps), time.monotonic() + timeout
        while not wanted <= set(self.steps(mode)):
            if time.monotonic() > until:
                raise UserError(f"{self._url} has no steps {numbered(sorted(wanted - set(self.steps(mode))))}")
            time.sleep(1.0)
            self.refresh()

    def findings(self) -> list[Finding]:
        """None: rules of SageMaker Debugger's told what they found elsewhere."""
        return []

    def judge(self, rules: Iterable[str], worker: str = "") -> Iterator[Finding]:
        """What these rules find in it. Raises :class:`UserError` for one that needs what was not kept."""
        from dltrain.debugger.smdebug.judging import judge  # which needs this module's classes

        return judge(self, rules, worker)

    def history(self, worker: str = "") -> Iterator[Seen]:
        """All that rules can be shown of it, in the order of the steps."""
        from dltrain.debugger.smdebug.judging import history

        return history(self, worker)

    def at(self, step: int) -> At:
        """The mode of a step, and its number among those of the mode."""
        return self._folder.steps[step]

    def _steps_of(self, mode: str) -> list[int]:
        if mode and mode not in self.modes():
            raise UserError(f"{self._url} has no mode {mode!r}; {nearest(mode, self.modes())}")
        return [step for step in self._folder.complete if not mode or self._folder.steps[step].mode == mode]

    def _number(self, step: int, mode: str) -> int:
        return self._folder.steps[step].step if mode else step

    def _belongs(self, name: str, collection: str) -> bool:
        """Whether a tensor is one of a collection's, or its name as it was matches one of the expressions."""
        names, expressions = self._folder.collections[collection]
        original = self._folder.original.get(name, name)
        return original in names or any(re.search(each, original) for each in expressions)

    def _losses(self) -> list[str]:
        return self.tensor_names(kind="losses")


def _form_for(name: str, forms: Forms) -> str | None:
    """By which form a reduction can be had: itself, another one, or the values."""
    wanted = [name, _RELATED[name][0]] if name in _RELATED else [name]
    found = [form for form in (*wanted, VALUE) if form in forms]
    return found[0] if found and (found[0] != VALUE or name in REDUCTIONS) else None


def _number(name: str, form: str, values: Values) -> float:
    if form == VALUE:
        return float(reduce(name, moments(values)))
    return float(values) if form == name else float(_RELATED[name][1](float(values)))


def moments(values: Values) -> Array:
    """Of values of any type: float64 [9]."""
    row: Array = row_of(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))).numpy()
    return row


def _there_is(kept: list[str]) -> str:
    return f"there is {', '.join(kept)}" if kept else "no reductions were kept either"
