"""The debugger in a run: statistics on due steps, rules at every step, findings told and acted on.

A due step's statistics are reduced over ranks at its end and reach the host with the step's loss, a fixed number of
steps later. On other steps nothing happens but a comparison and what rules do with the loss.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import takewhile
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
from dltrain.debugger.histograms import trimmed
from dltrain.debugger.needs import all_of
from dltrain.debugger.observing import Timelines, confusion_of, gathered_losses
from dltrain.debugger.policy import Policy
from dltrain.debugger.recorder import Guard, Recorder
from dltrain.debugger.reductions import Array
from dltrain.debugger.rules.base import Rule, Watch
from dltrain.debugger.rules.catalogue import build
from dltrain.debugger.run import SavedRun
from dltrain.debugger.seen import Seen, Tensors
from dltrain.debugger.system import SystemWatch
from dltrain.errors import UserError
from dltrain.hooks.base import NOTHING, Hook, Request, View
from dltrain.readings import Reading
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.runtime.step_clock import CLOCK, NEVER

AT_ONCE = 128
"""Most steps that rules look at together, where nothing but telling follows, and no statistics are due."""

LATEST = 2.0
"""Seconds after which they look in any case."""


FLUSHED = 10.0
"""Seconds after which scalars are on the disk."""


class Audience(Protocol):
    """Who else is told, such as TensorBoard; on rank 0."""

    def finding(self, finding: Finding) -> None: ...

    def statistics(self, step: int, tensors: Tensors) -> None: ...

    def histograms(self, step: int, counted: Mapping[str, tuple[Array, Array, Array]]) -> None: ...


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
        every, self._seconds = config.profiler.every, config.profiler.system
        self._timed = Policy(int(every.value)) if every else Policy.often(settings)
        self._max_norm, self._started = config.optim.max_norm, False
        self._busy, self._next = False, 0
        self._unread: list[tuple[float, Reading]] = []
        self._wake, self._flushed = 1, 0.0
        self._read_at: deque[int] = deque()
        self._at_once = AT_ONCE if set(words) == {"log"} else 1

    def model_built(self, model: nn.Module) -> None:
        self._collector.install(model)

    def fit_start(self, trainer: View) -> None:
        engine = trainer.engine
        choice = self._collector.begin(trainer)
        engine.sample_losses.on = self.needs.losses
        self._timelines = Timelines(self._environment, engine)
        CLOCK.watch(self._timed.next, engine.device)
        if self._environment.is_main:
            self._recorder = Recorder(self._folder, self._guard, trainer.step, choice.names, bool(choice.counted))
            self._system = SystemWatch(self._seconds, engine.device)
            if trainer.step:
                self._remember(trainer.step)

    def _remember(self, step: int) -> None:
        """Show the rules what they saw before the resume; what they find in it was told then."""
        try:
            before = SavedRun(str(self._folder.parent)).history()
            for seen in takewhile(lambda each: each.step <= step, before):
                self._watch.update(seen)
        except UserError as error:
            self._told(f"rules begin anew, for what was seen before the resume cannot be read: {error}")

    def step_start(self, trainer: View, batch: Batch) -> None:
        self._busy = trainer.step + 1 >= self._next
        if self._busy:
            self._collector.step_start(trainer, batch)
            self._captured.keep(trainer.step + 1, batch)

    def gradients_ready(self, trainer: View) -> None:
        if self._busy:
            self._collector.gradients_ready(trainer)

    def step_end(self, trainer: View) -> None:
        if not self._busy:
            return
        step = trainer.step
        self._timelines.step_end(step, CLOCK.on)
        if self._collector.step_end(trainer):
            self._read_at.append(step)
            fault = trainer.engine.fault() if self.needs.replicas else None  # collective
            if fault is not None and self._recorder is not None:
                self._faults.append((step, fault))
        self._wake = self._next_wake()
        always = self._captured.wanted or self._timelines.waiting
        self._next = 0 if always else min(self._collector.next, self._timed.next(step + 1))

    def step_read(self, trainer: View, reading: Reading) -> Request | None:
        # what rules do at every step is done for several at once: by itself it would find the processor's caches cold
        now, unread = time.time(), self._unread
        unread.append((now, reading))
        if reading.step >= self._wake or len(unread) >= self._at_once or now - unread[0][0] > LATEST:
            return self._catch_up()
        return None

    def _catch_up(self) -> Request | None:
        """Record and judge the steps whose values have come; at the last one alone there may be more."""
        unread, self._unread = self._unread, []
        if not unread:
            return None
        step = unread[-1][1].step
        due = bool(self._read_at) and self._read_at[0] == step
        if due:
            self._read_at.popleft()
        tensors, timeline = self._collector.read(step) if due else None, self._timelines.read(step)
        self._wake = self._next_wake()
        if self._recorder is None:
            return None
        most = self._max_norm or math.inf
        rows = [(r.step, now, r.loss, r.norm, r.learning_rate, r.loss_scale, _clip(r.norm, most)) for now, r in unread]
        self._recorder.rows(rows)
        if rows[-1][1] - self._flushed > FLUSHED:
            self._flushed = rows[-1][1]
            self._recorder.flush()
        seen = [Seen(*row) for row in rows]
        if due or timeline is not None or not self._started:
            observed = self._observed(step, tensors, timeline)
            found = self._watch.update_plain(seen[:-1])
            found += self._watch.update(seen[-1]._replace(tensors=tensors, observed=observed))
        else:
            found = self._watch.update_plain(seen)
        return self._act(found) or None if found else None

    def _next_wake(self) -> int:
        """The first step whose reading brings more than scalars."""
        return min(self._read_at[0] if self._read_at else NEVER, self._timelines.next)

    def evaluation_start(self, trainer: View) -> Request | None:
        if self._settings.evaluation:
            self._collector.evaluation_start()
        return self._catch_up()

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
        seen = Seen(trainer.step, time.time(), scores=scores, observed=observed)
        return self._act(self._watch.update(seen)) or None

    def checkpoint_saved(self, trainer: View, path: Path) -> Request | None:
        asked = self._catch_up()
        if self._recorder is not None:
            self._recorder.flush()  # a run that is killed goes on from here
        return asked

    def close(self) -> None:
        CLOCK.rest()
        try:
            self._catch_up()
        except Exception as error:  # noqa: BLE001 - a run that failed has said why, and its device may be gone
            self._told(f"the last steps are not recorded ({type(error).__name__}: {error})")
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
            self._show(step, tensors)
            observed["system"] = self._system.taken() if self._system is not None else []
            if self._faults and self._faults[0][0] == step:
                observed["replicas"] = self._faults.popleft()[1]
        for kind, value in observed.items():
            self._recorder.observed(step, kind, value)
        return observed

    def _show(self, step: int, tensors: Tensors) -> None:
        rows = dict(zip(tensors.index.names, tensors.rows, strict=True))
        counted = {name: (*trimmed(counts), rows[name]) for name, counts in tensors.counts.items()}
        for each in self._audience:
            each.statistics(step, tensors)
            if counted:
                each.histograms(step, counted)

    def _act(self, found: Iterable[Finding]) -> Request:
        """Tell what was found, and do what is to follow."""
        asked = NOTHING
        for each in found:
            self._told(str(each))
            if self._recorder is not None:
                self._recorder.finding(each)
            for audience in self._audience:
                audience.finding(each)
            words = self._acts.get(each.rule, ())
            asked |= self._actions.act(words, each)
            if "capture" in words:
                self._guard("captured batches", partial(self._captured.write, each.step))
        return asked


def _clip(norm: float, most: float) -> float:
    """What clipping multiplies gradients of this norm by."""
    return most / (norm + 1e-6) if norm + 1e-6 > most else 1.0
