"""The training loop: the only one, read from top to bottom.

``fit`` says what a run is and ``train_step`` what a step is. Nothing in a step waits for the device: one small
reduction carries the global count, the last step's loss and the ranks' requests, and is read ``LAG`` steps later.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dltrain.checkpoint.checkpointer import Checkpointer
from dltrain.config import Config, Length
from dltrain.config.tree import AUTO
from dltrain.data.batch import Batch
from dltrain.data.loader import Loader
from dltrain.data.order import step_key
from dltrain.errors import UserError, nearest
from dltrain.evaluation import BrokenOff, evaluate
from dltrain.hooks.base import EVENTS, NOTHING, Hook, Request
from dltrain.hooks.meter import Meter
from dltrain.metrics.base import Metric
from dltrain.optim.schedule import build_schedule
from dltrain.parallel.engine import Engine
from dltrain.readings import Reading, Readings, refuse_vanished
from dltrain.runtime.seeds import seed_all
from dltrain.runtime.step_clock import CLOCK
from dltrain.runtime.stop import StopFlag
from dltrain.task import Task

LAG = 2
"""Steps between a value's making and its reading, the same on every rank."""


STEPS_TO_STOP = LAG + 2
"""From a rank's wish to stop to the save: the step at work, the one whose reduction brings it to all, and the lag."""


class Trainer:
    """Trains ``task`` by ``engine`` on the batches of ``loader``.

    After :meth:`fit`, ``status`` is ``finished`` or ``stopped`` and ``scores`` are those of the last evaluation.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        engine: Engine,
        loader: Loader,
        *,
        evaluation: Loader | None = None,
        checkpointer: Checkpointer | None = None,
        hooks: Iterable[Hook] = (),
        stop: StopFlag | None = None,
        random_stream: int = 0,
    ) -> None:
        self.config, self.task, self.engine, self.loader = config, task, engine, loader
        self.evaluation, self.checkpointer = evaluation, checkpointer
        self.hooks = list(hooks)
        self._listeners = {event: [h for h in self.hooks if _overrides(h, event)] for event in EVENTS}
        self._stop = StopFlag() if stop is None else stop
        self._random_stream = random_stream
        self.step, self.scores, self.status = 0, {}, "new"
        self.best: dict[str, Any] | None = None
        self.last_metric: Metric | None = None
        self._evaluation_left, self._at, self._pace = False, 0, 0.0
        self._timed = _timed_requests(config)
        self._passed: dict[Request, int] = {}
        self._elapsed, self._since = 0.0, time.monotonic()
        self.trained_samples, self.trained_seconds = 0, 0.0
        self._requests = self._asked = NOTHING
        self._readings = Readings(engine.device, engine.counts)
        self._meter = Meter()
        self._position = loader.position
        self._resolve_length()
        self._check_metric()

    step: int
    """Optimizer steps done."""
    scores: dict[str, float]
    status: str

    @property
    def position(self) -> int:
        """Samples consumed over all epochs: the cursor."""
        return self.loader.position

    @property
    def epoch(self) -> float:
        return self.position / self.loader.samples

    def fit(self) -> str:
        """Train to the end of the run, or until asked to stop. Returns ``finished`` or ``stopped``."""
        self.status = "running"
        try:
            return self._fit()
        except BrokenOff:
            return self._interrupt(NOTHING if self._finished() else Request.EVALUATE)
        except (Exception, SystemExit) as error:
            error.dltrain_step = self._at  # type: ignore[union-attr]  # who tells of it says where it was
            raise

    def _fit(self) -> str:
        with closing(self._begin()) as batches:
            while not self._finished():
                before, self._at = (self.step, self.position), self.step + 1
                CLOCK.begin(self.step + 1)
                started = time.perf_counter()
                batch = next(batches)
                CLOCK.mark("data_wait")
                self._meter.add(time.perf_counter() - started, self.position - before[1])
                self.train_step(batch)
                self._pace = time.perf_counter() - started
                self.trained_seconds += self._pace
                self.trained_samples += self.position - before[1]
                CLOCK.mark("hooks")
                asked = self._read(self.step - LAG) | self._due(before)
                if Request.STOP in asked:
                    return self._interrupt(asked)
                if Request.FINISH in asked:
                    break
                self._periodic(asked)
        return self._finish()

    def train_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of the global batch.

        gradient = d/dw (sum of weight x loss) / (sum of weight x count), both over all ranks and samples
        """
        seed_all(step_key(self.config.run.seed, self.step, self._random_stream), self.engine.device)
        previous, self._position = self._position, self.position
        self._tell("step_start", batch)
        self._request_from_here()
        CLOCK.mark("hooks")
        count = self._readings.reduce(_count(self.task, batch), self._requests)
        self._requests = NOTHING
        CLOCK.mark("communication")
        loss = self.engine.forward_backward(batch, count)
        self._tell("gradients_ready")
        CLOCK.mark("hooks")
        learning_rate = self._schedule.at(self.step)
        norm = self.engine.step(learning_rate, self.config.optim.max_norm)
        CLOCK.mark("optimizer")
        self.step += 1
        self._readings.push(self.step, (previous, self.position), learning_rate, loss.sum, norm, self.engine.loss_scale)
        self._tell("step_end")

    def evaluate(self) -> Metric | None:
        """Score the held-out samples and note the best; ``None`` without any."""
        if self.evaluation is None:
            return None
        self._drain()
        self._tell("evaluation_start")
        watch = partial(self._tell, "evaluation_batch") if self._listeners["evaluation_batch"] else None
        metric = evaluate(self.engine, self.task, self.evaluation, watch, self._stops)
        self.scores, self.last_metric, self._evaluation_left = metric.compute(), metric, False
        record = {"step": self.step, "epoch": self.epoch, **{f"evaluation/{k}": v for k, v in self.scores.items()}}
        self._tell("evaluation_end", record)
        self._note_best()
        self._meter.restart()
        CLOCK.mark("evaluation")
        return metric

    def save(self) -> None:
        """Save a checkpoint of this step."""
        if self.checkpointer is None:
            return
        self._drain()
        path = self.checkpointer.save(self.step, self.engine, self.state_dict(), self._steps_to_stop)
        self._tell("checkpoint_saved", path)
        self._meter.restart()
        CLOCK.mark("checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors, as JSON, equal on every rank. Random state is a function of seed, step and rank."""
        return {
            "step": self.step,
            "cursor": self.loader.state_dict(),
            "random": {"seed": self.config.run.seed, "step": self.step},
            "schedule": {"total_steps": self.total_steps, "learning_rate": self._schedule.at(self.step)},
            "best": self.best,
            "evaluation_left": self._evaluation_left,
            "micro_batch": self.engine.micro_batch,
            "elapsed_seconds": self._elapsed + time.monotonic() - self._since,
            "hooks": {type(h).__name__: h.state_dict() for h in self.hooks if hasattr(h, "state_dict")},
            "config": self.config.model_dump(mode="json"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises :class:`UserError` when data or their order differ from the saved ones."""
        self.loader.load_state_dict(state["cursor"])
        self._position = self.position
        self.step = int(state["step"])
        self.best, self._elapsed = state["best"], float(state["elapsed_seconds"])
        self._evaluation_left = state["evaluation_left"]
        same = state["config"]["parallel"] == self.config.model_dump(mode="json")["parallel"]
        if self.engine.micro_batch == AUTO and same:  # another size would give other bits
            self.engine.micro_batch = state.get("micro_batch", AUTO)
        self._passed = {request: int(self._elapsed / interval.seconds) for request, interval in self._timed}
        for hook in self.hooks:
            if hasattr(hook, "load_state_dict") and type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        self._resolve_length()

    def _resolve_length(self) -> None:
        """Steps of the whole run: those done, and those the rest of its length takes; 0 where only the clock knows."""
        length, samples = self.config.run.length, self.loader.samples
        if length.unit == "ep":
            self.total_steps = self.step + self.loader.steps_to(int(length.value * samples))
        else:
            self.total_steps = 0 if length.unit == "h" else int(length.value)
        peak = self.config.optim.learning_rate
        self._schedule = build_schedule(self.config.schedule, peak, self.total_steps, self._steps_of)

    def _steps_of(self, length: Length) -> int:
        """Steps of a length in steps or epochs, counted from the start of the run."""
        if length.unit == "st":
            return int(length.value)
        return self.loader.steps_to(int(length.value * self.loader.samples), start=0)

    def _begin(self) -> Generator[Batch, None, None]:
        """Hooks start, what a stop had left undone is done, and the engine does what only first steps do."""
        self._tell("fit_start")
        if self._evaluation_left:
            self.evaluate()
        batches = iter(self.loader)
        if not self._finished():
            seed_all(step_key(self.config.run.seed, self.step, self._random_stream), self.engine.device)
            self.engine.settle(self.loader.peek)
        self._since = time.monotonic()
        self._meter.restart()
        return batches

    def _finished(self) -> bool:
        if self.config.run.length.unit == "h":
            return self._elapsed >= self.config.run.length.seconds
        return self.total_steps <= self.step

    def _request_from_here(self) -> None:
        """This rank's wishes: a signal's, and on rank 0 the clock's."""
        if self._stops():
            self._requests |= Request.STOP
        if not self._timed or (dist.is_initialized() and dist.get_rank()):
            return
        elapsed = self._elapsed + time.monotonic() - self._since
        for request, interval in self._timed:
            passed = int(elapsed / interval.seconds)
            if passed > self._passed.get(request, 0):
                self._passed[request] = passed
                self._requests |= request

    def _stops(self) -> bool:
        saving = 0.0 if self.checkpointer is None else self.checkpointer.longest
        return self._stop.look(saving + self._steps_to_stop)

    @property
    def _steps_to_stop(self) -> float:
        """Seconds from a signal to its save."""
        return STEPS_TO_STOP * self._pace

    def _read(self, up_to: int) -> Request:
        """Read the values of steps up to ``up_to``, log what is due, and return what the ranks have asked for."""
        asked, self._asked = self._asked, NOTHING
        for reading in self._readings.pop(up_to):
            asked |= reading.requests
            self._log(reading)
        return asked

    def _drain(self) -> None:
        """Read every step so far, so that records are complete before what follows; requests wait for the next step."""
        for reading in self._readings.flush():
            self._asked |= reading.requests
            self._log(reading)

    def _log(self, reading: Reading) -> None:
        self._tell("step_read", reading)
        self._refuse_nonfinite(reading)
        position, samples = reading.position, self.loader.samples
        before = (reading.step - 1, reading.previous)
        if not self.config.logging.every.due(before, (reading.step, position), samples) and reading.step != 1:
            return
        record = {
            "step": reading.step,
            "epoch": position / samples,
            "loss": reading.loss,
            "learning_rate": reading.learning_rate,
            "grad_norm": reading.norm,
            **self._meter.read(),
            **self.loader.seen(),
        }
        if reading.loss_scale:
            record["loss_scale"] = reading.loss_scale
        self._tell("logged", record)

    def _refuse_nonfinite(self, reading: Reading) -> None:
        if reading.finite:
            return
        if reading.loss_scale:
            refuse_vanished(reading)
            return
        if self.config.run.nonfinite == "skip":
            return
        raise UserError(
            f"the gradient of step {reading.step} is not finite (loss {reading.loss:.4g}, norm {reading.norm:.4g}); "
            "its update was skipped and the run stopped. Lower optim.learning_rate, set optim.max_norm, look at the "
            "data, or let such steps pass with run.nonfinite skip"
        )

    def _due(self, before: tuple[int, int]) -> Request:
        """What falls due with this step, as if it were asked for."""
        after, samples, due = (self.step, self.position), self.loader.samples, NOTHING
        if self.config.evaluation.every.due(before, after, samples):
            due |= Request.EVALUATE
        if self.config.checkpoint.every.due(before, after, samples):
            due |= Request.SAVE
        return due

    def _periodic(self, asked: Request) -> None:
        """Evaluate and save, the evaluation first: it decides which checkpoint is best."""
        if self._finished():
            return
        if Request.EVALUATE in asked:
            self.evaluate()
        if Request.SAVE in asked:
            self.save()

    def _check_metric(self) -> None:
        """Refuse, before the first step, a metric that no evaluation would bring."""
        metric = self.config.evaluation.metric
        if self.evaluation is not None:
            names = list(self.task.metrics().compute())
            if metric not in names:
                raise UserError(f"evaluation.metric is {metric!r}, which is not scored; {nearest(metric, names)}")

    def _note_best(self) -> None:
        """Save and mark the checkpoint whose score is better than all before."""
        metric, better = self.config.evaluation.metric, max if self.config.evaluation.mode == "max" else min
        value = self.scores[metric]
        if self.best is not None and better(self.best["value"], value) == self.best["value"]:
            return
        self.best = {"step": self.step, "metric": metric, "value": value}
        if self.checkpointer is not None:
            self.save()
            self.checkpointer.mark_best(**self.best)

    def _interrupt(self, asked: Request) -> str:
        """Save at once; an evaluation that is due is done when the run goes on."""
        self._evaluation_left = Request.EVALUATE in asked
        self._drain()
        self._tell("stop_requested", self._stop.reason or "another rank or a hook")
        self.save()
        self.status = "stopped"
        return self.status

    def _finish(self) -> str:
        self._drain()
        self.evaluate()
        self.save()
        self.status = "finished"
        self._tell("fit_end")
        return self.status

    def _tell(self, event: str, *details: Any) -> None:
        for hook in self._listeners[event]:
            request = getattr(hook, event)(self, *details)
            if request is not None:
                if not isinstance(request, Request):
                    raise UserError(f"{type(hook).__name__}.{event}() returned {request!r}; return a Request or None")
                self._requests |= request


def _count(task: Task, batch: Batch) -> torch.Tensor:
    batch = batch.host or batch
    return torch.dot(task.count(batch).to(batch.weight.dtype), batch.weight)


def _timed_requests(config: Config) -> list[tuple[Request, Length]]:
    """What the clock asks for: intervals in hours."""
    wanted = (
        (Request.FINISH, config.run.length),
        (Request.SAVE, config.checkpoint.every),
        (Request.EVALUATE, config.evaluation.every),
    )
    return [(request, length) for request, length in wanted if length.unit == "h" and length]


def _overrides(hook: Hook, event: str) -> bool:
    return getattr(type(hook), event) is not getattr(Hook, event)
