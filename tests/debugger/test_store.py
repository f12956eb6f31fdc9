"""Statistics on disk: what was written is read, whole, after stops, crashes and other tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain.debugger.moments import COLUMNS
from dltrain.debugger.run import open_run
from dltrain.debugger.store import Store, segments_in
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

NAMES = ["head.weight", "gradient/head.weight"]


def rows(step: int) -> np.ndarray[Any, Any]:
    return np.arange(2 * len(COLUMNS), dtype=np.float64).reshape(2, -1) + 1000 * step


def write(folder: Path, start: int, stop: int, names: list[str] = NAMES) -> None:
    with Store(folder / "debugger" / "statistics") as store:
        store.begin(start, names)
        for step in range(start + 1, stop + 1):
            store.scalars(step, (100.0 + step, 1 / step, 2.0, 0.1, 0.0, 1.0))
            if step % 2 == 0:
                store.statistics(step, rows(step))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 0, 9)
    run = open_run(str(tmp_path))
    assert run.steps() == [2, 4, 6, 8]
    assert run.tensor_names() == NAMES
    assert run.tensor_names(kind="gradients") == run.tensor_names(regex="^grad") == ["gradient/head.weight"]
    steps, losses = run.scalars("loss")
    assert steps.tolist() == list(range(1, 10))
    assert losses[3] == 0.25
    tensor = run.tensor("gradient/head.weight")
    assert np.array_equal(tensor.moments, [rows(step)[1] for step in (2, 4, 6, 8)])
    assert tensor.reductions("max").tolist() == [rows(step)[1][6] for step in (2, 4, 6, 8)]
    assert tensor.reduction_value(6, "abs_sum") == rows(6)[1][3]
    assert [seen.step for seen in run.history() if seen.tensors is not None] == [2, 4, 6, 8]


def test_steps_that_are_done_again_are_dropped_and_the_segment_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 0, 9)
    write(tmp_path, 5, 8)
    run = open_run(str(tmp_path))
    assert run.steps() == [2, 4, 6, 8]
    assert run.scalars("loss")[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(segments_in(tmp_path / "debugger" / "statistics")) == 1


def test_other_tensors_begin_another_segment(tmp_path: Path) -> None:
    write(tmp_path, 0, 5)
    write(tmp_path, 4, 8, ["head.weight", "update/head.weight"])
    run = open_run(str(tmp_path))
    assert run.steps() == [2, 4, 6, 8]
    assert run.tensor("head.weight").steps == [2, 4, 6, 8]
    assert run.tensor("update/head.weight").steps == [6, 8]
    write(tmp_path, 1, 4)  # all of it is done again
    assert open_run(str(tmp_path)).tensor_names() == NAMES


def test_a_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, 9)
    for path in (tmp_path / "debugger" / "statistics").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    run = open_run(str(tmp_path))
    assert run.steps() == [2, 4, 6]
    assert run.scalars("loss")[0][-1] == 8
    write(tmp_path, 8, 12)
    assert open_run(str(tmp_path)).steps() == [2, 4, 6, 10, 12]


def test_a_run_under_a_url_is_read(tmp_path: Path, s3: S3Server) -> None:
    from dltrain import storage

    write(tmp_path, 0, 4)
    for path in (tmp_path / "debugger" / "statistics").iterdir():
        storage.write(f"s3://data/runs/x/debugger/statistics/{path.name}", path.read_bytes())
    assert open_run("s3://data/runs/x").steps() == [2, 4]


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no statistics; train with --debugger.every"):
        open_run(str(tmp_path))
    write(tmp_path, 0, 4)
    run = open_run(str(tmp_path))
    for ask, words in (
        (lambda: run.tensor("head.wait"), "has no tensor 'head.wait'; did you mean 'head.weight'"),
        (lambda: run.tensor("head.weight").reductions("mode"), "there is no reduction 'mode'"),
        (lambda: run.tensor("head.weight").reduction_value(3, "max"), "no statistics of step 3; it has those of 2, 4"),
        (lambda: run.scalars("lost"), "there is no scalar 'lost'"),
        (lambda: run.wait_for_steps([2, 60], timeout=0.0), "has no statistics of steps 60"),
    ):
        with pytest.raises(UserError, match=words):
            ask()
    path = segments_in(tmp_path / "debugger" / "statistics")[0]
    path.write_bytes(b"hello\n")
    with pytest.raises(UserError, match="is no segment of statistics"):
        open_run(str(tmp_path))
