"""What may watch a run. A hook observes; to act it returns a request.

Requests of all ranks ride on the next step's reduction and are acted on a fixed number of steps later, by every rank at
the same step. Values of a step reach hooks in ``logged``, a few steps late, so that the device is never waited for.

    class StopAtLoss(Hook):
        def logged(self, trainer, record):
            return Request.STOP if record["loss"] < 0.01 else None
"""

from __future__ import annotations

import enum
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.metrics.base import Metric
from dltrain.parallel.engine import Engine
from dltrain.task import Task

if TYPE_CHECKING:
    from dltrain.data.loader import Loader
    from dltrain.metrics.base import Metric
    from dltrain.readings import Reading

EVENTS = (
    "fit_start",
    "step_start",
    "gradients_ready",
    "step_end",
    "step_read",
    "logged",
    "evaluation_start",
    "evaluation_batch",
    "evaluation_end",
    "checkpoint_saved",
    "stop_requested",
    "fit_end",
)


class Request(enum.Flag):
    """What a hook may ask for."""

    STOP = enum.auto()
    """Save and end; the run can be resumed."""
    FINISH = enum.auto()
    """End as if the run's length were reached."""
    SAVE = enum.auto()
    """Save a checkpoint."""
    EVALUATE = enum.auto()
    """Evaluate."""


NOTHING = Request(0)
"""No request: the loop's most frequent value, made once."""


class View(Protocol):
    """What a hook may read of the trainer."""

    config: Config
    task: Task
    engine: Engine
    loader: Loader
    step: int
    total_steps: int

    @property
    def position(self) -> int: ...

    @property
    def epoch(self) -> float: ...

    @property
    def last_metric(self) -> Metric | None:
        """Of the last evaluation, over all ranks."""
        ...


class Hook:
    """Override any of the events. With ``state_dict`` the hook is saved and resumed under its class name."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for name in vars(cls):
            close = get_close_matches(name, EVENTS, n=1, cutoff=0.8)
            if close and name not in EVENTS and callable(getattr(cls, name)):
                raise UserError(f"hook {cls.__name__} has a method {name!r}, which no event calls; is it {close[0]!r}?")

    def model_built(self, model: nn.Module) -> None:
        """The model as this rank has it, before it is compiled and wrapped: the place for forward hooks. Not called
        where the pipeline is traced, which calls no modules."""

    def fit_start(self, trainer: View) -> Request | None:
        """Before the first step, after a resume."""

    def step_start(self, trainer: View, batch: Batch) -> Request | None:
        """A batch is at hand."""

    def gradients_ready(self, trainer: View) -> Request | None:
        """Gradients are reduced, not yet clipped."""

    def step_end(self, trainer: View) -> Request | None:
        """Weights are updated; ``trainer.step`` counts this step."""

    def step_read(self, trainer: View, reading: Reading) -> Request | None:
        """The loss and norm of a step are known, a few steps after it; of every step, equal on every rank."""

    def logged(self, trainer: View, record: dict[str, Any]) -> Request | None:
        """A record of a logged step, equal on every rank but for timings."""

    def evaluation_start(self, trainer: View) -> Request | None:
        """The held-out samples are about to be scored."""

    def evaluation_batch(self, trainer: View, batch: Batch, outputs: Any, losses: Tensor) -> Request | None:
        """Held-out samples were scored: the task's predictions of them, and their losses [n]; on ranks that count."""

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> Request | None:
        """Scores over all ranks."""

    def checkpoint_saved(self, trainer: View, path: Path) -> Request | None:
        """A checkpoint is committed."""

    def stop_requested(self, trainer: View, reason: str) -> Request | None:
        """The ranks have agreed to stop; a checkpoint follows."""

    def fit_end(self, trainer: View) -> Request | None:
        """After the last step, evaluation and checkpoint."""

    def report_written(self, step: int, folder: Path) -> None:
        """The last evaluation's report, with its pictures, lies in the folder; after :meth:`fit_end`, on rank 0."""

    def close(self) -> None:
        """Always called, also after an error."""
