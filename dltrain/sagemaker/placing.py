"""Where a run's things go in a training job, and what follows from its being one.

config = placed(config, job, given)  # before the ranks begin

The run's folder is the one that SageMaker keeps in S3 and brings back, where the job has one: so a spot interruption
costs what came after the last checkpoint, and records, statistics and events go on as well. Without it the folder lies
in what becomes the job's output. Either way an unfinished run of the recipe that lies there is gone on with, unless
another job seems to be at work on it: SageMaker would copy both jobs' files over each other.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dltrain.config import Config, Run
from dltrain.errors import UserError
from dltrain.run_folder import RunFolder, all_runs, read_lines
from dltrain.sagemaker.training_job import TrainingJob

C = TypeVar("C", bound=Config)

RUNS = "runs"
"""Below the folder of the job's output."""

GRACE = 110.0
"""Seconds that ranks have to save: SageMaker kills 120 after its signal."""

ALIVE = 600.0
"""Seconds for which a run's last record is a sign of life."""


def placed(config: C, job: TrainingJob, given: Collection[str]) -> C:
    """The config with folder and resume of the run set, where neither the config nor ``given`` names say anything."""
    run, usual = config.run, Run()
    changes: dict[str, Any] = {}
    if "run.folder" not in given and run.folder == usual.folder:
        changes["folder"] = str(_folder(job))
    if "run.resume" not in given and run.resume == usual.resume:
        changes["resume"] = "auto"
    changes["grace"] = min(run.grace, GRACE)
    return config.replace(run=run.replace(**changes))


def kept(settings: Mapping[str, Any], job: TrainingJob) -> dict[str, Any]:
    """Settings by which the run that ``run.resume`` names is looked for where the job keeps its runs."""
    named = settings.get("run.resume", "auto") not in ("auto", "never")
    return {"run.folder": str(_folder(job)), **settings} if named else dict(settings)


def _folder(job: TrainingJob) -> Path:
    return job.checkpoints.folder if job.checkpoints is not None else job.folders.output_data / RUNS


def refuse_alive(run: RunFolder, job: TrainingJob) -> None:
    """Raises :class:`UserError` where another job wrote to this run a short while ago and has not ended it."""
    record = run.read() if run.record.is_file() else {}
    other = record.get("job") or job.name
    if other == job.name or record["status"] != "running":
        return
    lines = read_lines(run.metrics)
    silent = time.time() - (lines[-1]["time"] if lines else record["created"])
    if silent < ALIVE:
        raise UserError(
            f"the run {run.name} among the checkpoints is of job {other}, which wrote to it {silent:.0f} s ago: two "
            "jobs at once must not share a prefix; give this one checkpoints of its own, wait "
            f"{ALIVE / 60:.0f} minutes, or, where that job has ended, go on with --run.resume {run.name}"
        )


def about(run: RunFolder, folder: Path) -> str:
    """What a user may not expect of the chosen run; empty where it is plain."""
    if run.record.is_file():
        other = run.read().get("job")
        return f"going on with run {run.name}" + (f" of job {other}" if other else "")
    others = [f"{each.name} ({each.read()['status']})" for each in all_runs(folder)]
    found = "that is not finished and has this recipe and preset"
    return f"none of the runs in {folder} is one {found}: {', '.join(others)}; beginning a new run" if others else ""
