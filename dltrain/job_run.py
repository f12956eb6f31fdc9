"""A job on this rank and the run it belongs to: which one, in whose folder, held by whom, and what its record says.

run = own(job, *agreed(job, partial(chosen, job)))
with held(job, run), recorded(job, run, dataset, hooks, weights):
    ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from dltrain import storage
from dltrain.checkpoint.checkpointer import Checkpointer
from dltrain.config import Config, to_yaml
from dltrain.data.reader import Dataset
from dltrain.errors import UserError
from dltrain.hooks.base import Hook
from dltrain.parallel.weights import Weights
from dltrain.run_folder import RunFolder, choose_run, first_record
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import say
from dltrain.runtime.together import from_main
from dltrain.sagemaker.placing import about, refuse_alive
from dltrain.sagemaker.training_job import TrainingJob
from dltrain.task import Task


@dataclass(frozen=True)
class Job:
    """A recipe's task under a config, on this rank."""

    task: type[Task]
    recipe: str
    preset: str
    config: Config
    environment: Environment
    of: TrainingJob | None = None
    """The job of SageMaker's that it is part of."""


def chosen(job: Job) -> tuple[RunFolder, bool]:
    """The run, and whether it is one of ``run.folder``'s. Raises :class:`UserError`."""
    folder = Path(job.config.run.folder).expanduser()
    run = choose_run(job.config, job.recipe, job.preset, moved=job.of is not None)
    if job.of is not None and job.config.run.resume == "auto":
        refuse_alive(run, job.of)
        if told := about(run, folder):
            say(job.environment, told)
    return run, run.path.parent == folder


def own(job: Job, run: RunFolder, of_folder: bool) -> RunFolder:
    """The run that rank 0 has chosen as this host has it, where each has a folder of its own."""
    there = RunFolder(Path(job.config.run.folder).expanduser() / run.name)
    return there if of_folder and job.of is not None and not is_shared(job, there) else run


def checkpointer_of(job: Job, run: RunFolder) -> Checkpointer:
    """Of the run's checkpoints, as this host has them."""
    config = job.config
    return Checkpointer(run.checkpoints, config.checkpoint.keep, job.environment, config.run.grace, is_shared(job, run))


def is_shared(job: Job, run: RunFolder) -> bool:
    """Whether all hosts see the run's folder: those that SageMaker copies are each host's own."""
    if job.of is None:
        return True
    own = [job.of.folders.output, *([] if job.of.checkpoints is None else [job.of.checkpoints.folder])]
    return not any(run.path.resolve().is_relative_to(folder.resolve()) for folder in own)


T = TypeVar("T")


def agreed(job: Job, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank; its mistake is refused by all."""
    decided: list[Any] = [None]
    if job.environment.is_main:
        try:
            decided = [decide()]
        except UserError as error:
            decided = [error]
    (found,) = from_main(decided)
    if isinstance(found, UserError):
        raise found
    return cast(T, found)


@contextmanager
def held(job: Job, run: RunFolder) -> Iterator[None]:
    """The run's folder, made and held by rank 0; nothing of it is made or changed before."""
    lock: list[IO[str]] = []
    agreed(job, lambda: lock.append(run.claim()))
    try:
        yield
    finally:
        for file in lock:
            file.close()


@contextmanager
def recorded(job: Job, run: RunFolder, dataset: Dataset, hooks: list[Hook], weights: Weights | None) -> Iterator[None]:
    """``run.json`` says that the run goes on, and how it ended if it fails; hooks are closed either way."""
    _record_start(job, run, dataset)
    if weights is not None and weights.match is not None and job.environment.is_main:
        say(job.environment, str(weights.match))
        run.update(weights=weights.match.record())
    try:
        yield
    except BaseException:
        record_end(job, run, "failed")
        raise
    finally:
        for hook in hooks:
            hook.close()


def _record_start(job: Job, run: RunFolder, dataset: Dataset) -> None:
    if not job.environment.is_main:
        return
    record = first_record(job.config, job.recipe, job.preset, job.environment.world_size, dataset)
    if job.of is not None:
        record["job"] = job.of.name
    if run.record.is_file():
        record |= {"created": run.read()["created"], "reason": ""}
    run.update(**record)
    storage.write(str(run.config), to_yaml(job.config).encode())
    storage.write(str(run.recipe), Path(inspect.getfile(job.task)).read_bytes())
    say(job.environment, f"run {run.path} on {job.environment.world_size} rank(s)")


def record_end(job: Job, run: RunFolder, status: str, **facts: Any) -> None:
    """How the run ended: ``finished``, ``stopped`` or ``failed``, and other fields of ``run.json``."""
    if job.environment.is_main and run.record.is_file():
        run.update(status=status, **facts)
