"""The hook that fills TensorBoard's tabs while a run goes on; rank 0 alone has it.

    hooks.append(TensorBoard(Events(run.tensorboard), config, environment))

Whatever fails in watching is told once and ends the watching, never the run, unless ``debugger.strict`` is on. Pictures
and the projector take time, so they are made again only as often as that is a small share of it, and at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.tensorboard import summary

from dltrain.config import Config, to_yaml
from dltrain.data.batch import Batch
from dltrain.debugger.findings import Finding
from dltrain.debugger.seen import Tensors
from dltrain.errors import UserError
from dltrain.hooks.base import Hook, View
from dltrain.metrics.base import Curved
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import warn
from dltrain.tensorboard.curves import curve
from dltrain.tensorboard.events import Events
from dltrain.tensorboard.features import Features, has_features
from dltrain.tensorboard.graph import graph_of, lacks_graph
from dltrain.tensorboard.images import SHOWN, inputs, labels_of, picture, picture_of, predicted_of
from dltrain.tensorboard.layout import layout_of, tag_of
from dltrain.tensorboard.pace import Pace
from dltrain.tensorboard.settings import session_end, session_start
from dltrain.tensorboard.tensors import Counted, histogram, scalars

Method = TypeVar("Method", bound=Callable[..., None])


def _quietly(method: Method) -> Method:
    """A method of the hook's as long as nothing has failed."""

    @wraps(method)
    def safely(self: TensorBoard, *values: Any) -> None:
        if not self.failed:
            try:
                method(self, *values)
            except Exception as error:  # noqa: BLE001 - who only watches ends no run
                self.fail(error)

    return cast(Method, safely)


class TensorBoard(Hook):
    """Writes ``events``; ``failed`` once something has kept it from that."""

    def __init__(self, events: Events, config: Config, environment: Environment) -> None:
        self._events, self._environment = events, environment
        self._features = Features() if has_features(config) else None
        self._strict = config.debugger.strict
        self._pace = Pace()
        self._first: Batch | None = None
        self._begun = self.failed = self._left_behind = False
        self._drawn = -1

    def fail(self, error: Exception) -> None:
        """Write no more, and say why. Raises :class:`UserError` where that is to end the run."""
        told = f"cannot write TensorBoard's events in {self._events.folder}: {type(error).__name__}: {error}"
        self.failed = True
        if self._strict:
            raise UserError(f"{told}; mend that, or set debugger.strict false or logging.tensorboard false") from error
        warn(self._environment, f"{told}; the run goes on without them")

    def model_built(self, model: nn.Module) -> None:
        if self._features is not None:
            self._features.watch(model)

    @_quietly
    def fit_start(self, trainer: View) -> None:
        config, step = trainer.config, trainer.step
        scores = [name for name in self._scores(trainer) if name != "samples"]
        self._events.open(step)
        for each in session_start(config, [tag_of(f"evaluation/{name}") for name in scores]):
            self._events.add(each, step)
        self._text("config", f"```yaml\n{to_yaml(config)}\n```", step)
        self._events.add(summary.custom_scalars(layout_of(config, scores)), step)  # type: ignore[no-untyped-call]
        self._events.show()

    @_quietly
    def step_start(self, trainer: View, batch: Batch) -> None:
        if not self._begun:
            self._begun = True
            self._first = next((batch.host or batch).split(SHOWN))

    def step_end(self, trainer: View) -> None:
        if self._first is not None:  # after the step, whose random numbers are its own
            batch, self._first = self._first, None
            self._show_inputs(trainer, batch)
            self._show_graph(trainer, batch)

    @_quietly
    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._scalar(tag_of(name), value, record["step"])

    def evaluation_start(self, trainer: View) -> None:
        if self._features is not None and not self.failed:
            self._features.begin()

    @_quietly
    def evaluation_batch(self, trainer: View, batch: Batch, outputs: Any, losses: Tensor) -> None:
        if self._features is not None and self._features.on:
            facts = trainer.task.facts
            columns = {"label": labels_of(batch, facts), "predicted": predicted_of(outputs, facts), "key": batch.keys}
            columns["loss"] = [f"{value:.4g}" for value in losses.tolist()]
            self._features.add(batch, {name: column for name, column in columns.items() if any(column)})

    @_quietly
    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> None:
        if self._features is not None:
            self._features.on = False
        for name, value in record.items():
            if name.startswith("evaluation/") and name != "evaluation/samples":
                self._scalar(tag_of(name), value, trainer.step)
        if isinstance(trainer.last_metric, Curved):
            for name, counts in trainer.last_metric.curves().items():
                self._events.add(curve(f"precision and recall/{name}", counts), trainer.step)
        if self._pace.allows():
            with self._pace.timed():
                self._draw(trainer)
                self._project(trainer)
        self._events.show()
        self._copy()

    @_quietly
    def checkpoint_saved(self, trainer: View, path: Path) -> None:
        self._events.show()
        self._copy()

    @_quietly
    def stop_requested(self, trainer: View, reason: str) -> None:
        self._project(trainer)

    @_quietly
    def fit_end(self, trainer: View) -> None:
        self._project(trainer)
        if not trainer.config.evaluation.report:
            self._draw(trainer)
        self._events.add(session_end(), trainer.step)

    @_quietly
    def report_written(self, step: int, folder: Path) -> None:
        self._add_pictures(step, folder)

    @_quietly
    def finding(self, finding: Finding) -> None:
        """What a rule of the debugger's has found, as text."""
        lines = [f"**{finding.what}** (step {finding.step})", finding.why, finding.advice]
        lines += ["\n".join(f"- `{name}`" for name in finding.where)]
        if finding.numbers:
            rows = "\n".join(f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in finding.numbers.items())
            lines.append(f"| number | value |\n|---|---|\n{rows}")
        self._text(f"findings/{finding.rule}", "\n\n".join(filter(None, lines)), finding.step)

    @_quietly
    def statistics(self, step: int, tensors: Tensors) -> None:
        """What is seen of tensors at a step, as one number of each layer and kind."""
        for tag, value in scalars(tensors):
            self._scalar(tag, value, step)

    @_quietly
    def histograms(self, step: int, counted: Mapping[str, Counted]) -> None:
        """Values of tensors counted in bins, by the tensors' names."""
        for name, each in counted.items():
            self._events.add(histogram(name, each), step)

    def close(self) -> None:
        self._strict = False  # there is no run any more that could be ended
        self._close()
        if self.failed:
            with suppress(OSError):  # which was told
                self._events.close()
        self._copy(last=True)

    @_quietly
    def _close(self) -> None:
        self._events.close()

    def _copy(self, last: bool = False) -> None:
        """Of the events elsewhere. A store that does not answer now may do so the next time."""
        try:
            self._events.copy(wait=last)
        except Exception as error:
            if self._strict:
                raise
            if not self._left_behind:
                told = f"cannot copy TensorBoard's events: {type(error).__name__}: {error}"
                warn(self._environment, f"{told}; they are in {self._events.folder}")
            self._left_behind = True

    @_quietly
    def _show_inputs(self, trainer: View, batch: Batch) -> None:
        for name, pixels in inputs(batch, trainer.task.facts):
            self._events.add(picture(f"inputs/{name}", pixels), trainer.step)

    @_quietly
    def _show_graph(self, trainer: View, batch: Batch) -> None:
        config, task = trainer.config, trainer.task
        parameters = sum(each.numel() for _, each in trainer.engine.named_parameters())
        reason = lacks_graph(config, trainer.engine.mesh, parameters)
        if not reason:
            try:
                self._events.add_graph(graph_of(task, batch, config.precision))
            except Exception as error:  # noqa: BLE001 - a model may do anything when it is traced
                reason = f"{type(error).__name__} while {type(task).__name__}.model() was traced: {_first_line(error)}"
                warn(self._environment, f"TensorBoard has no graph of the model: {reason}")
        if reason:
            self._text("graph", f"There is no graph of the model: {reason}.", trainer.step)

    def _scores(self, trainer: View) -> list[str]:
        """Names of the scores, that by which the best checkpoint is kept first."""
        if not trainer.config.data.evaluation:
            return []
        first = trainer.config.evaluation.metric
        return [first, *(name for name in trainer.task.metrics().compute() if name != first)]

    def _draw(self, trainer: View) -> None:
        """The pictures of the metric's report, of this rank's most telling samples."""
        metric = trainer.last_metric
        if metric is not None and self._drawn != trainer.step:
            with tempfile.TemporaryDirectory(prefix="dltrain-") as folder:
                metric.report(Path(folder), metric.examples())
                self._add_pictures(trainer.step, Path(folder))

    def _add_pictures(self, step: int, folder: Path) -> None:
        self._drawn = step
        for file in sorted(folder.glob("*.png")):
            self._events.add(picture_of(f"evaluation/{file.stem}", file), step)

    def _project(self, trainer: View) -> None:
        if self._features is not None:
            self._events.add_files(self._features.files(trainer.step))

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._events.add(summary.scalar(tag, value), step)  # type: ignore[no-untyped-call]

    def _text(self, tag: str, text: str, step: int) -> None:
        self._events.add(summary.text(tag, text), step)  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no more is known")
