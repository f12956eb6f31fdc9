"""How a rank ends whose work breaks off: what it leaves for whoever started it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dltrain.job_process import guarded
from dltrain.runtime.environment import Environment
from dltrain.runtime.word import FAILURES, Failure, failures_in
from tests.conftest import ROOT

TRAINER = ROOT / "dltrain" / "trainer.py"
RANK_1 = Environment(1, 2, 1, 2)


@pytest.mark.parametrize(("code", "status"), [(7, 7), (0, 1), (None, 1), ("no more", 1)])
def test_a_rank_that_leaves_by_itself_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: object, status: int
) -> None:
    monkeypatch.setenv(FAILURES, str(tmp_path))
    assert guarded(lambda: sys.exit(code), RANK_1) == status  # type: ignore[arg-type]
    (failure,) = failures_in(tmp_path)
    assert failure.message == f"dltrain: rank 1 left by sys.exit({code!r}) before its work was done"
    assert failure.error == ("SystemExit" if code is None else f"SystemExit: {code}")
    assert failure.frames[-1].startswith("test_guarded.py:")


def test_the_users_lines_are_told_and_the_last_one_of_all() -> None:
    code = compile(
        "def scale(x):\n    return x.open()\n\ndef loss(x):\n    return scale(x)\n", "/opt/ml/code/mine.py", "exec"
    )
    made: dict[str, Any] = {}
    exec(code, made)
    inside = compile("def deep():\n    raise OSError(28)\ndef open():\n    return deep()\n", str(TRAINER), "exec")
    ours: dict[str, Any] = {}
    exec(inside, ours)
    try:
        made["loss"](SimpleNamespace(open=ours["open"]))
    except OSError as error:
        frames = Failure.of(error, 0, "", 1).frames
    assert frames == ("mine.py:5 in loss", "mine.py:2 in scale", "trainer.py:2 in deep")


def test_a_mistake_of_the_environment_is_told_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "dltrain.runtime.rank", str(ROOT / "recipes/image/classify.py"), "train"]
    ranks = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    variables = {**os.environ, "PYTHONPATH": str(ROOT), FAILURES: str(tmp_path), **ranks}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (failure,) = failures_in(tmp_path)
    assert failure.status == 2
    assert failure.message.startswith("dltrain: error: this host runs 2 rank(s) of 3, and there are 2 hosts")
    assert "Traceback" not in done.stderr


def test_help_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURES, str(tmp_path))
    for words, status in ((["--help"], 0), (["--nothing"], 2)):
        with pytest.raises(SystemExit) as left:
            guarded(lambda words=words: argparse.ArgumentParser().parse_args(words), RANK_1)
        assert left.value.code == status
    assert not failures_in(tmp_path)


@pytest.mark.parametrize(
    ("first", "error", "status"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'", 1),
        ("import sys; sys.exit(3)", "SystemExit: 3", 3),
        ("import sys; sys.exit(0)", None, 0),
    ],
)
def test_a_recipe_that_breaks_off_as_it_is_read_says_why(
    tmp_path: Path, first: str, error: str | None, status: int
) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(f"import beside\n{first}\n")
    (tmp_path / "beside.py").touch()
    command = [sys.executable, "-m", "dltrain.runtime.rank", str(recipe), "train"]
    variables = {"PYTHONPATH": str(ROOT), FAILURES: str(tmp_path), "RANK": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    found = failures_in(tmp_path)
    assert [failure.error for failure in found] == ([] if error is None else [error])
    if found:
        assert (found[0].rank, found[0].status, found[0].frames) == (1, status, ("mine.py:2 in <module>",))
        assert "failed as mine.py was read" in found[0].message


def test_what_a_rank_has_told_stays(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from dltrain.runtime.word import Failure, report_failure\n"
        "report_failure(Failure(1, 'the reason', 2, 'UserError: the reason'))\nraise SystemExit(2)\n"
    )
    variables = {"PYTHONPATH": str(ROOT), FAILURES: str(tmp_path), "RANK": "1"}
    done = subprocess.run([sys.executable, "-m", "dltrain.runtime.rank", str(recipe)], env=variables)
    assert done.returncode == 2
    assert [failure.message for failure in failures_in(tmp_path)] == ["the reason"]
