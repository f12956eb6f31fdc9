"""Garbage is collected at the steps that are said, and Python is left as it was."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from dltrain.hooks.collection import Collection
from tests.conftest import TINY, Cli


def test_garbage_is_collected_after_so_many_steps_and_never_otherwise() -> None:
    hook, collections = Collection(3), [0]

    def count(phase: str, info: Any) -> None:
        collections[0] += phase == "stop"

    hook.fit_start(SimpleNamespace(step=0))  # type: ignore[arg-type]
    gc.callbacks.append(count)
    try:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for step in range(1, 8):
            kept = [[] for _ in range(5000)]  # type: ignore[var-annotated]  # enough to start a collection by itself
            hook.step_end(SimpleNamespace(step=step))  # type: ignore[arg-type]
            assert kept
        assert collections[0] == 2
    finally:
        gc.callbacks.remove(count)
        hook.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_closing_leaves_python_as_it_was_found() -> None:
    """A job closes its hooks after an error as well; one that never began changes nothing."""
    gc.disable()
    hook = Collection(3)
    hook.fit_start(SimpleNamespace(step=0))  # type: ignore[arg-type]
    hook.close()
    assert not gc.isenabled()
    gc.enable()
    Collection(3).close()
    assert gc.isenabled()


@pytest.mark.slow
def test_a_run_collects_so(cli: Cli) -> None:
    words = ("train", TINY, "--preset", "small", "--run.length", "3st", "--schedule.warmup", "1st")
    done = cli(*words, "--run.collect_every", "2", "--nproc", "2")
    assert done.status == 0, done.err
