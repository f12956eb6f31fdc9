"""The debugger in a run: statistics on due steps, rules at every step, findings told and acted on.

A due step's statistics are reduced over ranks at its end and reach the host with the step's loss, a fixed number of
steps later. On other steps nothing happens but a comparison and what rules do with the loss.
"""

from __future__ import annotations

import json
import time
from collections import deque
from functools import reduce
from operator import or_
from pathlib import Path
from typing import IO, Any

from torch import nn

from dltrain import storage
from dltrain.config import Config
from dltrain.debugger.activations import Activations
from dltrain.debugger.policy import Policy, kinds_of
from dltrain.debugger.rules.base import Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.sampler import Sampler, Table
from dltrain.debugger.seen import Index, Seen, Tensors
from dltrain.debugger.store import Store
from dltrain.hooks.base import Hook, Request, View
from dltrain.readings import Reading
from dltrain.run_folder import read_lines
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn


class Debug(Hook):
    """On every rank; that of rank 0 has the ``folder`` to write into, and the rules."""

    def __init__(self, config: Config, environment: Environment, folder: Path | None) -> None:
        settings, self._kinds = config.debugger, kinds_of(config)
        self._policy = Policy.of(settings)
        self._settings, self._environment, self._folder = settings, environment, folder
        rules = build(settings.rules)  # on every rank, so that a mistake is refused by all
        self._watch = Watch(rules if folder else [], lambda told: warn(environment, told))
        self._activations = Activations() if "activations" in self._kinds else None
        self._sampler: Sampler | None = None
        self._due, self._sent = False, deque[tuple[int, Table]]()
        self._store = Store(folder / "statistics") if folder else None
        self._findings: IO[str] | None = None

    def model_built(self, model: nn.Module) -> None:
        if self._activations is not None:
            self._activations.install(model)

    def fit_start(self, trainer: View) -> None:
        kinds = [kind for kind in self._kinds if kind != "activations"]
        others = self._activations.names() if self._activations is not None else ()
        self._sampler = Sampler(trainer.engine, kinds, others)
        self._index = Index(self._sampler.names)
        if self._store is not None and self._folder is not None:
            self._store.begin(trainer.step, self._sampler.names)
            self._findings = _resumed(self._folder / "findings.jsonl", trainer.step)

    def step_start(self, trainer: View, batch: Any) -> None:
        self._due = self._policy.due(trainer.step + 1)
        if self._activations is not None:
            self._activations.on = self._due

    def gradients_ready(self, trainer: View) -> None:
        if self._due and self._sampler is not None:
            self._sampler.take("gradients")
            if "updates" in self._kinds:
                self._sampler.remember()

    def step_end(self, trainer: View) -> None:
        if self._due and self._sampler is not None:
            for kind in self._kinds:
                if kind not in ("gradients", "activations"):
                    self._sampler.take(kind)
            if self._activations is not None:
                self._activations.on = False
                for name, row in self._activations.taken(trainer.engine.mesh):
                    self._sampler.put(name, row)
            self._sent.append((trainer.step, self._sampler.send()))

    def step_read(self, trainer: View, reading: Reading) -> Request | None:
        tensors = None
        if self._sent and self._sent[0][0] == reading.step:
            rows = self._sent.popleft()[1].rows()
            tensors = Tensors(self._index, rows)
            if self._store is not None:
                self._store.statistics(reading.step, rows)
        if self._store is None:
            return None
        now = time.time()
        values = (reading.loss, reading.norm, reading.learning_rate, reading.loss_scale)
        self._store.scalars(reading.step, (now, *values))
        return self._judge(Seen(reading.step, now, *values, tensors))

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> Request | None:
        if self._store is None:
            return None
        scores = {name.removeprefix("evaluation/"): value for name, value in record.items()}
        return self._judge(Seen(trainer.step, time.time(), scores=scores))

    def checkpoint_saved(self, trainer: View, path: Path) -> None:
        if self._store is not None:
            self._store.flush()  # a run that is killed goes on from here

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._findings is not None:
            self._findings.close()

    def _judge(self, seen: Seen) -> Request | None:
        found = list(self._watch.update(seen))
        for each in found:
            warn(self._environment, str(each))
            if self._findings is not None:
                self._findings.write(each.as_json() + "\n")
        if not found:
            return None
        asked = {"save": Request.SAVE, "stop": Request.STOP}
        wanted = [asked[action] for action in self._settings.actions if action in asked]
        return reduce(or_, wanted) if wanted else None


def _resumed(path: Path, step: int) -> IO[str]:
    """The findings of steps that will not be done again, and what follows."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(str(path), "".join(json.dumps(line) + "\n" for line in kept).encode())
    return path.open("a", buffering=1)
