"""The debugger in a run: statistics on due steps, rules at every step, findings told and acted on.

A due step's statistics are reduced over ranks at its end and reach the host with the step's loss, a fixed number of
steps later. On other steps nothing happens but a comparison and what rules do with the loss.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
from torch import nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.debugger.actions import Actions
from dltrain.debugger.capture import Captured
from dltrain.debugger.collecting import Collector
from dltrain.debugger.findings import Finding
from dltrain.debugger.needs import all_of
from dltrain.debugger.observing import Timelines, confusion_of, gathered_losses
from dltrain.debugger.policy import Policy
from dltrain.debugger.recorder import Guard, Recorder
from dltrain.debugger.rules.base import Rule, Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.seen import Seen, Tensors
from dltrain.debugger.system import SystemWatch
from dltrain.hooks.base import NOTHING, Hook, Request, View
from dltrain.readings import Reading
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.runtime.step_clock import CLOCK


class Audience(Protocol):
    """Who else is told, such as TensorBoard; on rank 0."""

    def finding(self, finding: Finding) -> None: ...

    def statistics(self, step: int, tensors: Tensors) -> None: ...


class Debug(Hook):
    """On every rank; that of rank 0 writes into ``folder`` and judges, by the config's rules and ``own`` ones."""

    def __init__(
        self,
        config: Config,
        environment: Environment,
        folder: Path,
        own: Iterable[Rule] = (),
        audience: Iterable[Audience] = (),
    ) -> None:
        settings = config.debugger
        self._settings, self._environment, self._folder = settings, environment, folder
        self._told = partial(warn, environment)
        rules = [*build(settings.rules), *own]  # on every rank, so that a mistake is refused by all
        self._acts = {type(rule).__name__: (*settings.actions, *rule.actions) for rule in rules}
        words = dict.fromkeys(word for some in (settings.actions, *self._acts.values()) for word in some)
        self._actions = Actions(words, self._told)
        self._watch, self.needs = Watch(rules, self._told), all_of(rule.needs() for rule in rules)
        self._guard, self._audience = Guard(environment, settings.strict), list(audience)
        self._collector = Collector(config, environment, folder, self.needs, self._guard)
        self._captured = Captured(environment.is_main and "capture" in words, folder)
        self._recorder: Recorder | None = None
        self._system: SystemWatch | None = None
        self._faults: deque[tuple[int, str]] = deque()
        every, self._seconds = config.profiler.every, config.profiler.system or 1.0
        self._timed = Policy(int(every.value)) if every else Policy.of(settings)
        self._max_norm, self._started = config.optim.max_norm, False

    def model_built(self, model: nn.Module) -> None:
        self._collector.install(model)

    def fit_start(self, trainer: View) -> None:
        engine = trainer.engine
        choice = self._collector.begin(trainer)
        engine.sample_losses.on = self.needs.losses
        self._timelines = Timelines(self._environment, engine.device)
        CLOCK.watch(self._timed.due, engine.device)
        if self._environment.is_main:
            self._recorder = Recorder(self._folder, self._guard, trainer.step, choice.names, bool(choice.counted))
            self._system = SystemWatch(self._seconds, engine.device)

    def step_start(self, trainer: View, batch: Batch) -> None:
        self._collector.step_start(trainer, batch)
        self._captured.keep(trainer.step + 1, batch)

    def gradients_ready(self, trainer: View) -> None:
        self._collector.gradients_ready(trainer)

    def step_end(self, trainer: View) -> None:
        self._timelines.step_end(trainer.step, CLOCK.on)
        if self._collector.step_end(trainer) and self.needs.replicas:
            self._faults.append((trainer.step, trainer.engine.fault()))

    def step_read(self, trainer: View, reading: Reading) -> Request | None:
        step = reading.step
        tensors = self._collector.read(step)
        timeline = self._timelines.read(step)
        if self._recorder is None:
            return None
        clip = min(1.0, self._max_norm / (reading.norm + 1e-6)) if self._max_norm else 1.0
        values = (time.time(), reading.loss, reading.norm, reading.learning_rate, reading.loss_scale, clip)
        self._recorder.scalars(step, values)
        if tensors is None and timeline is None and self._started:
            return self._judge(Seen(step, *values))
        return self._judge(Seen(step, *values, tensors, observed=self._observed(step, tensors, timeline)))

    def evaluation_start(self, trainer: View) -> None:
        if self._settings.evaluation:
            self._collector.evaluation_start()

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> Request | None:
        tensors = self._collector.evaluation_end(trainer) if self._settings.evaluation else None
        losses = gathered_losses(trainer.engine, self._environment) if self.needs.losses else None
        if self._recorder is None:
            return None
        confusion = confusion_of(trainer.last_metric) if self.needs.confusion else None
        observed = {"losses": losses, "confusion": confusion}
        observed = {kind: value for kind, value in observed.items() if value is not None}
        for kind, value in observed.items():
            self._recorder.observed(trainer.step, kind, value, evaluation=True)
        if tensors is not None:
            self._recorder.evaluation(trainer.step, tensors)
        scores = {name.removeprefix("evaluation/"): value for name, value in record.items()}
        return self._judge(Seen(trainer.step, time.time(), scores=scores, observed=observed))

    def checkpoint_saved(self, trainer: View, path: Path) -> None:
        if self._recorder is not None:
            self._recorder.flush()  # a run that is killed goes on from here

    def close(self) -> None:
        CLOCK.wanted = None
        self._actions.close()
        for part in (self._system, self._recorder):
            if part is not None:
                part.close()

    def _observed(self, step: int, tensors: Tensors | None, timeline: dict[str, Any] | None) -> dict[str, Any]:
        """What goes with a step that was due, or in which a timeline came; all of it is written."""
        observed: dict[str, Any] = {} if timeline is None else {"timeline": timeline}
        if not self._started:
            self._started = True
            observed["initialization"] = time.time() - psutil.Process().create_time()
        if self._recorder is None:
            raise AssertionError("only the rank that records is shown")
        if tensors is not None:
            self._recorder.statistics(step, tensors)
            for each in self._audience:
                each.statistics(step, tensors)
            observed["system"] = self._system.taken() if self._system is not None else []
            if self._faults and self._faults[0][0] == step:
                observed["replicas"] = self._faults.popleft()[1]
        for kind, value in observed.items():
            self._recorder.observed(step, kind, value)
        return observed

    def _judge(self, seen: Seen) -> Request | None:
        asked = NOTHING
        for each in self._watch.update(seen):
            self._told(str(each))
            if self._recorder is not None:
                self._recorder.finding(each)
            for audience in self._audience:
                audience.finding(each)
            words = self._acts.get(each.rule, ())
            asked |= self._actions.act(words, each)
            if "capture" in words:
                self._guard("captured batches", partial(self._captured.write, each.step))
        return asked or None
