"""Collecting on every rank: what is due is looked at, reduced over ranks, and read a fixed number of steps later.

collector.begin(trainer)  # collective, as are the events of a step
collector.step_start(trainer, batch); collector.gradients_ready(trainer); collector.step_end(trainer)
collector.read(step)  # later: the Tensors of a due step, else None
"""

from __future__ import annotations

import re
from collections import deque
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.debugger.activations import Activations
from dltrain.debugger.needs import Needs
from dltrain.debugger.observing import Labels
from dltrain.debugger.raw import wholes, write_raw
from dltrain.debugger.recorder import RAW, Guard
from dltrain.debugger.sampler import Sampler, Table, names_of, union
from dltrain.debugger.seen import Index, Tensors, kind_of
from dltrain.debugger.selection import NOTHING, OF_MODULES, Choice, Selection
from dltrain.errors import UserError
from dltrain.hooks.base import View
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn


class Collector:
    """Of the tensors that the config and the ``needs`` of rules ask for; raw ones go into ``folder``."""

    def __init__(self, config: Config, environment: Environment, folder: Path, needs: Needs, guard: Guard) -> None:
        self._environment, self._folder, self._guard = environment, folder / RAW, guard
        self._strict, self._on = config.debugger.strict, config.debugger.on
        self._selection = Selection(config, needs)
        self._activations = Activations(self._selection, compiled=config.precision.compile)
        self._labels = Labels(needs)
        self._due, self._sent = NOTHING, deque[tuple[int, Table]]()
        self._raw: dict[str, Tensor] = {}
        self._keys: tuple[str, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Watch the modules of a model that is not compiled yet, if any step is due."""
        if self._on:
            self._activations.install(model)

    def begin(self, trainer: View) -> Choice:
        """Before the first step; returns what was chosen of what there is."""
        engine = trainer.engine
        labels = [f"labels/{name}" for name in self._labels.fields(trainer.loader.peek())] if self._labels.on else []
        if engine.mesh.pp_rank:
            self._activations.forget_first_input()
        modules = union([*self._activations.names(), *labels])
        self._choice = choice = self._selection.choose(names_of(engine, self._selection.candidates, modules))
        self._refuse_unmatched(choice)
        self._sampler = Sampler(engine, choice.names, choice.counted)
        kinds = dict.fromkeys(kind_of(name) for name in choice.names)
        self._kinds = [kind for kind in kinds if kind not in OF_MODULES]
        self._index = Index(choice.names)
        self._of_modules = Sampler(engine, [each for each in choice.names if kind_of(each) in OF_MODULES])
        return choice

    @property
    def next(self) -> int:
        """The next step on which there is something to do."""
        return 0 if self._labels.on else self._choice.next

    def step_start(self, trainer: View, batch: Batch) -> None:
        due = self._due = self._choice.due(trainer.step + 1)
        if self._labels.on:
            self._labels.add(batch)
        if due:
            self._sampler.begin(due)
            self._keys = batch.keys
            watched = self._activations
            watched.begin(due, "train")
            watched.counted, watched.raw = self._choice.counted, self._choice.raw

    def gradients_ready(self, trainer: View) -> None:
        if not self._due:
            return
        if "gradients" in self._kinds:
            self._take(trainer, "gradients")
        if "updates" in self._kinds:
            self._sampler.remember()

    def step_end(self, trainer: View) -> bool:
        """Whether this step was due."""
        if not self._due:
            return False
        for kind in self._kinds:
            if kind != "gradients":
                self._take(trainer, kind)
        if self._labels.on and trainer.engine.mesh.counts and not trainer.engine.mesh.pp_rank:
            self._labels.put(self._activations.shares, trainer.engine)
        self._put_modules(trainer, self._sampler)
        self._sent.append((trainer.step, self._sampler.send()))
        self._write_raw(trainer.step)
        return True

    def read(self, step: int) -> Tensors | None:
        """Of this step, where it was due; asked of each step once, in order."""
        if not self._sent or self._sent[0][0] != step:
            return None
        table = self._sent.popleft()[1]
        counts = zip(self._sampler.counted, table.counts(), strict=True)
        return Tensors(self._index, table.rows(), {name: some for name, some in counts if some.any()})

    def evaluation_start(self) -> None:
        """What modules take in and return is noted until the evaluation ends."""
        watched = self._activations
        watched.begin(frozenset(self._of_modules.names), "eval")
        watched.counted = watched.raw = NOTHING

    def evaluation_end(self, trainer: View) -> Tensors:
        """What was noted since."""
        self._put_modules(trainer, self._of_modules)
        return Tensors(Index(self._of_modules.names), self._of_modules.send().rows())

    def _take(self, trainer: View, kind: str) -> None:
        self._sampler.take(kind)
        wanted = self._choice.raw & self._due
        if wanted and kind != "updates":
            self._raw.update(wholes(trainer.engine, kind, wanted))

    def _put_modules(self, trainer: View, sampler: Sampler) -> None:
        watched = self._activations
        for name, row in watched.taken(trainer.engine.mesh):
            sampler.put(name, row)
        for name, counts in watched.counts().items():
            sampler.count(name, counts)
        watched.end()
        self._raw.update(watched.kept() if trainer.engine.mesh.counts else {})

    def _write_raw(self, step: int) -> None:
        if self._raw:
            tensors, self._raw = self._raw, {}
            write = partial(write_raw, self._folder, step, self._environment.rank, tensors, self._keys)
            self._guard("raw tensors", write)

    def _refuse_unmatched(self, choice: Choice) -> None:
        """A pattern that nothing matches is told; refused where it is strict."""
        for title in choice.unmatched:
            told = (
                f"debugger.collections.{title} matches no tensor; see their names with dltrain debug show RUN --names"
            )
            if self._strict:
                raise UserError(told)
            warn(self._environment, told)
        for pattern in self._selection.raw:
            if not any(re.search(pattern, name) for name in choice.names):
                told = f"debugger.raw {pattern!r} matches no tensor; dltrain debug show RUN --names tells their names"
                if self._strict:
                    raise UserError(told)
                warn(self._environment, told)
