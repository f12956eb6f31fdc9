"""Where a run's things go in a training job, and what follows from its being one.

config = placed(config, job, given)  # before the ranks begin

The run's folder is the one that SageMaker keeps in S3 and brings back, where the job has one: so a spot interruption
costs what came after the last checkpoint, and records, statistics and events go on as well. Without it the folder lies
in what becomes the job's output. Either way an unfinished run of the recipe that lies there is gone on with.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from dltrain.config import Config, Run
from dltrain.sagemaker.training_job import TrainingJob

C = TypeVar("C", bound=Config)

RUNS = "runs"
"""Below the folder of the job's output."""


def placed(config: C, job: TrainingJob, given: Collection[str]) -> C:
    """The config with folder and resume of the run set, where neither the config nor ``given`` names say anything."""
    run, usual = config.run, Run()
    changes = {}
    if "run.folder" not in given and run.folder == usual.folder:
        folder = job.checkpoints.folder if job.checkpoints is not None else job.folders.output_data / RUNS
        changes["folder"] = str(folder)
    if "run.resume" not in given and run.resume == usual.resume:
        changes["resume"] = "auto"
    return config.replace(run=run.replace(**changes)) if changes else config
