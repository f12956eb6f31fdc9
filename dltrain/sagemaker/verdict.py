"""What became of a host's ranks, told in the log, in the failure file and by the exit status."""

from __future__ import annotations

import sys

from dltrain.runtime.ending import Ending
from dltrain.sagemaker.failure import write_failure, write_reason
from dltrain.sagemaker.training_job import TrainingJob


def verdict(job: TrainingJob, ending: Ending) -> int:
    """Say what happened, in the log and in the failure file; returns the exit status."""
    if ending.failure is not None:
        write_failure(job.folders, ending.failure, job.host, job.hosts)
        print(ending.told, file=sys.stderr, flush=True)
    elif ending.told:
        write_reason(job.folders, ending.told)
        print(f"dltrain: {ending.told}", file=sys.stderr, flush=True)
    elif ending.status:
        why = f"the ranks of {job.host} could not be started (status {ending.status}); the log says why"
        write_reason(job.folders, why)
    return ending.status
