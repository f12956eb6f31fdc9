"""A rank as a process: where it stands, how it ends, and what it says where it fails.

environment = environment_of_process()
status = guarded(lambda: train(job), environment)
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dltrain.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from dltrain.runtime.ending import is_of_peers
from dltrain.runtime.environment import Environment, rendezvous
from dltrain.runtime.word import Failure, is_of_words, report_failure
from dltrain.sagemaker.failure import write_failure
from dltrain.sagemaker.training_job import TrainingJob

PEERS_SPEAK = 3.0
"""Seconds that a rank waits before it tells that its peers are gone."""


def environment_of_process() -> Environment:
    """Where this rank stands, in torch's own variables as well."""
    try:
        environment = Environment.read()
    except UserError as error:
        rank = os.environ.get("RANK", "")
        number = int(rank) if rank.isdecimal() else 0
        if not report_failure(Failure.of(error, number, f"dltrain: error: {error}", EXIT_USER_ERROR)):
            print(f"dltrain: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    os.environ.update(rendezvous(environment, os.environ))
    return environment


def leave(status: int) -> None:
    """End a rank without taking the interpreter down: what is left of process groups may wait there for peers inside a
    collective, and gloo's threads now and then abort a rank whose work is done."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def guarded(body: Any, environment: Environment) -> int:
    """Run ``body``; the user's mistake becomes one sentence, anything else keeps its traceback."""
    rank = environment.rank
    try:
        return int(body())
    except UserError as error:
        failure = Failure.of(error, rank, f"dltrain: error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt as error:
        failure = Failure.of(error, rank, "dltrain: interrupted; the last saved checkpoint is whole", EXIT_INTERRUPTED)
    except SystemExit as error:
        if is_of_words(error):
            raise
        status = error.code if isinstance(error.code, int) and error.code else 1
        message = f"dltrain: rank {rank} left by sys.exit({error.code!r}) before its work was done"
        failure = Failure.of(error, rank, message, status)
    except Exception as error:  # noqa: BLE001 - shown whole, by the launcher or here
        failure = Failure.of(error, rank, f"dltrain: rank {rank} failed:\n{traceback.format_exc()}", 1)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows what the first rank to fail has left there
            get_error_handler().record_exception(error)
    if not report_failure(failure):
        _leave_word(failure)
        print(failure.message, file=sys.stderr, flush=True)
    return failure.status


def _leave_word(failure: Failure) -> None:
    """For SageMaker, where no launcher of ours does it; a rank whose peers are gone lets them speak first."""
    try:
        job = TrainingJob.read()
    except UserError:
        return  # a job that is described so badly has no folder for it
    if job is not None:
        time.sleep(PEERS_SPEAK if is_of_peers(failure) else 0)
        write_failure(job.folders, failure, job.host, job.hosts)
