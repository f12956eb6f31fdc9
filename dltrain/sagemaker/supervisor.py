"""The entry point of a training container: ``python -m dltrain.sagemaker [RECIPE] [--preset NAME] [--nproc N] ...``

It is fit to be process 1. It reads what SageMaker has laid down, refuses mistakes before anything is started, waits for
the other hosts, starts this host's ranks by torchrun, hands signals on, and leaves a failure file and an exit status
that say what happened: 0, 2 after the user's mistake, 75 where the job was asked to stop and has saved.

Recipe, preset and settings come from hyperparameters (``recipe``, ``preset``, ``optim__learning_rate``) or from the
words of the command.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from dltrain.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from dltrain.runtime.ending import Ending
from dltrain.runtime.environment import cores
from dltrain.runtime.host import run_host
from dltrain.runtime.logs import outlive_readers
from dltrain.runtime.meeting import agent, patience, port, wait_for
from dltrain.sagemaker.failure import write_reason
from dltrain.sagemaker.folders import Folders
from dltrain.sagemaker.network import variables_for
from dltrain.sagemaker.placing import GRACE
from dltrain.sagemaker.start import Start, install_requirements, read_start
from dltrain.sagemaker.training_job import TrainingJob
from dltrain.sagemaker.verdict import verdict

ARGUMENT = "train"
"""What SageMaker hands to an image's own entry point, where the request names none."""


def main(arguments: Sequence[str]) -> int:
    """Run this host's part of the job; returns the exit status."""
    outlive_readers()
    folders = Folders.read()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # process 1 gets no signal that it has no handler of
    try:
        job, run = _prepared(folders, arguments)
        ending = run()
    except _Interrupted as signalled:
        print(f"dltrain: {signalled} came before any rank was started", file=sys.stderr, flush=True)
        write_reason(folders, f"{signalled} came before any rank was started")
        return EXIT_INTERRUPTED
    except UserError as error:
        print(f"dltrain: error: {error}", file=sys.stderr, flush=True)
        write_reason(folders, str(error))
        return EXIT_USER_ERROR
    except Exception as error:
        write_reason(folders, f"in the container's entry point: {type(error).__name__}: {error}; the log has it whole")
        raise
    return verdict(job, ending)


def _prepared(folders: Folders, arguments: Sequence[str]) -> tuple[TrainingJob, Callable[[], Ending]]:
    """The job and what runs this host's ranks, when all that can be checked has been and all hosts are there."""
    began, job = time.time(), TrainingJob.read()
    if job is None:
        raise UserError(
            f"there is no training job here: {folders.config} has no resourceconfig.json; start a recipe outside "
            "SageMaker with dltrain train, or try its container with dltrain launch local --as-sagemaker"
        )
    for told in job.hyperparameters.told:
        print(f"dltrain: {told}", file=sys.stderr)
    install_requirements(job)
    words = arguments[1:] if arguments[:1] == [ARGUMENT] else arguments
    start = read_start(job, job.hyperparameters.arguments(words))
    if start.code is not None:  # a recipe below its top finds modules beside its folder
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(start.code), os.environ.get("PYTHONPATH"))))
    network = variables_for(job.instance_type, job.interface, len(job.hosts))
    wait_for(job.hosts, patience())
    threads = start.config.run.threads or max(1, cores() // start.nproc)
    apart = f"the {len(job.hosts)} hosts did not come together at {job.hosts[0]}"
    return job, partial(run_host, partial(command_of, job, start), start.name, threads, began, GRACE, apart, network)


class _Interrupted(Exception):
    """A signal came; its name."""


def _leave(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(signal.Signals(number).name)


def command_of(job: TrainingJob, start: Start, report: Path) -> list[str]:
    """torchrun's own words: all hosts meet at the first one."""
    head = f"{job.hosts[0]}:{port()}"
    words = agent(report, start.nproc, len(job.hosts), head, job.host, job.name or "dltrain")
    return [*words, str(start.recipe), "train", *start.arguments]
