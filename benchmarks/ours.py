"""The same training by dltrain: the Trainer as users have it, fed from memory.

A loader that reads and decodes would measure something else; :class:`Repeat` is as cheap as the bare loop's iterator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import Case
from dltrain.config import Config, Data, Length, Optim, Parallel, Precision, Run, Schedule
from dltrain.data.batch import Batch
from dltrain.data.loader import Loader
from dltrain.hooks.base import Hook
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.trainer import Trainer


class OurLoop:
    """An engine, and for every call of :meth:`prepare` a trainer over it. ``hooks`` watch every one of them.

    With ``parallel`` and the ``plan`` of the model, on the rank that ``environment`` says.
    """

    def __init__(
        self,
        case: Case,
        hooks: Sequence[Hook] = (),
        parallel: Parallel | None = None,
        plan: Plan | None = None,
        environment: Environment | None = None,
    ) -> None:
        self._config = config_of(case).replace(parallel=parallel or Parallel())
        self._task = _CaseTask(self._config, case, plan)
        self._batch, self._hooks = _batch_of(case), hooks
        mesh = build_mesh(self._config.parallel, environment or Environment(), case.device)

        def watch(model: nn.Module) -> None:
            for hook in hooks:
                hook.model_built(model)

        self._engine = parallelize(self._task, self._config, mesh, case.device, lambda: self._batch, watch=watch)
        self.model: nn.Module = self._engine.model

    def prepare(self, steps: int) -> Callable[[], object]:
        """What trains for ``steps`` when called, from the start of ``fit`` to its end."""
        config = self._config.replace(run=self._config.run.replace(length=Length.parse(f"{steps}st")))
        loader = cast(Loader, Repeat(self._batch))
        return Trainer(config, self._task, self._engine, loader, hooks=self._hooks).fit


class Repeat:
    """One batch again and again: what :class:`Trainer` asks of a loader, without reading anything."""

    samples = 2**40  # an epoch without an end: nothing is due at one
    tail = "carry"

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.position = 0
        self.global_batch_size = len(batch)

    @property
    def steps(self) -> int:
        return self.samples // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += self.global_batch_size
            yield self._batch

    def peek(self) -> Batch:
        return self._batch

    def seen(self) -> dict[str, float]:
        return {}  # nothing is read, so it costs nothing

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = int(state["position"])


def config_of(case: Case) -> Config:
    """The case's settings where dltrain has them, and its defaults everywhere else."""
    return Config(
        run=Run(seed=case.seed),
        data=Data(global_batch_size=len(case)),
        optim=Optim(learning_rate=case.learning_rate, weight_decay=case.weight_decay, max_norm=case.max_norm),
        schedule=Schedule(name="constant"),
        precision=Precision(
            compute="bf16" if case.bf16 else "fp32", compile=case.compile, channels_last=case.channels_last
        ),
    )


class _CaseTask(Task):
    def __init__(self, config: Config, case: Case, plan: Plan | None) -> None:
        super().__init__(config)
        self._case, self._plan = case, plan

    def plan(self) -> Plan | None:
        return self._plan

    def model(self) -> nn.Module:
        return self._case.build()

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (self._case.prepare(batch.fields["input"]),)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["target"], reduction="none")


def _batch_of(case: Case) -> Batch:
    batch = Batch(
        fields={"input": case.inputs, "target": case.targets},
        weight=torch.ones(len(case)),
        keys=tuple(str(place) for place in range(len(case))),
        position=torch.arange(len(case)),
    )
    return batch.pin_memory() if case.device.type == "cuda" else batch
