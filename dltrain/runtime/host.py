"""This host's part of a job: torchrun's agent with its ranks, minded until they have ended.

ending = run_host(lambda report: [*agent(report, ...), "recipe.py", "train"], recipe, threads, began, grace, apart)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dltrain.runtime.ending import Ending, ending_of
from dltrain.runtime.launch import RECIPE
from dltrain.runtime.minding import Minded
from dltrain.runtime.stop import STARTED
from dltrain.runtime.word import FAILURES


def run_host(
    command_of: Callable[[Path], Sequence[str]],
    recipe: str,
    threads: int,
    began: float,
    grace: float,
    apart: str,
    variables: Mapping[str, str] | None = None,
) -> Ending:
    """Run the command that ``command_of`` makes of the place for the agent's report; what became of it.

    ``recipe`` is by what name it was started, ``threads`` are each rank's, ``began`` is when the job did (seconds of
    the epoch), ``grace`` seconds to save after a signal; ``apart`` says which hosts should have met. ``variables`` are
    set where the environment does not say otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="dltrain-") as folder:
        words, report = Path(folder) / "words", Path(folder) / "report.json"
        words.mkdir()
        usual = {**(variables or {}), "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        own = {FAILURES: str(words), RECIPE: recipe, STARTED: str(began)}
        minded = Minded(command_of(report), {**usual, **os.environ, **own}, words, grace)
        status = minded.run()
        return ending_of(minded, status, words, report, apart)
