"""Nothing that was saved is lost to what lies there damaged or torn."""

from __future__ import annotations

from pathlib import Path

import pytest

from dltrain.checkpoint.checkpointer import committed
from tests.conftest import TINY, Cli

WORDS = ("train", TINY, "--preset", "small", "--run.name", "x", "--run.resume", "auto")


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_begins_anew_and_keeps_its_new_ones(cli: Cli, tmp_path: Path) -> None:
    assert cli(*WORDS).status == 0
    folder = tmp_path / "runs" / "x" / "checkpoints"
    for part in folder.rglob("__0_0.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    done = cli(*WORDS, "--run.length", "8st")
    assert done.status == 0, done.err
    assert "no checkpoint of runs/x is whole: it begins anew, at step 0" in done.err
    assert len(list(folder.glob("damaged-*-step-*/COMMITTED"))) == 2
    assert [path.name for path in committed(folder)] == ["step-00000004", "step-00000008"]


@pytest.mark.slow
def test_a_torn_save_is_cleared_away_when_the_run_goes_on(cli: Cli, tmp_path: Path) -> None:
    assert cli(*WORDS, TINY_DIE="9:SIGTERM").status == 75
    folder = tmp_path / "runs" / "x" / "checkpoints"
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "__0_0.distcp").write_bytes(b"half of it")
    assert cli(*WORDS).status == 0
    assert not (folder / "step-00000003").exists()
