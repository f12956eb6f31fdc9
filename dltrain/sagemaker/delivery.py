"""What a training job hands over at its end: the model, and in the job's output report and scores.

SageMaker packs the folders of all hosts together, so rank 0 alone writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

from dltrain import storage
from dltrain.checkpoint.export import export_model
from dltrain.parallel.engine import Engine
from dltrain.run_folder import RunFolder
from dltrain.runtime.environment import Environment
from dltrain.runtime.together import barrier
from dltrain.sagemaker.training_job import TrainingJob

SCORES = "scores.json"


def deliver(
    job: TrainingJob, run: RunFolder, engine: Engine, scores: Mapping[str, float], step: int, here: Environment
) -> None:
    """At the end of a run, after ``step``; collective."""
    record = run.read() if here.is_main else {}
    facts = {
        "job": job.name,
        "recipe": record.get("recipe"),
        "preset": record.get("preset"),
        "facts": record.get("facts"),
        "scores": scores,
        "step": step,
        "versions": record.get("versions"),
        "weights": "averaged" if record.get("config", {}).get("optim", {}).get("ema") else "last",
    }
    files = {path.name: path.read_bytes() for path in (run.config, run.recipe)} if here.is_main else {}
    export_model(job.folders.model, engine, facts, files)
    if here.is_main:
        output = job.folders.output_data
        output.mkdir(parents=True, exist_ok=True)
        storage.write(str(output / SCORES), (json.dumps(dict(scores), indent=1) + "\n").encode())
        if run.report.is_dir():
            shutil.copytree(run.report, output / "report", dirs_exist_ok=True)
    barrier()  # a host whose ranks have left would be ended while this one still writes
