"""What of the user's code is brought to a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker import code
from dltrain.sagemaker.code import read_code


def written(folder: Path, *files: str) -> str:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(bytes(1000))
    return str(folder / "mine.py")


def test_what_runs_and_python_leave_is_not_brought(tmp_path: Path) -> None:
    recipe = written(tmp_path, "mine.py", "runs.py", "lib/runs_of.py", "requirements.txt", ".env", ".git/config",
                     "runs/a/run.json", "lib/__pycache__/a.pyc", "sagemaker-local/x", "lib/.hidden/b")  # fmt: skip
    found = read_code(recipe)
    assert found.files == ("lib/runs_of.py", "mine.py", "requirements.txt", "runs.py")
    assert found.size == 4000
    assert found.told() == f"4 file(s), 0.0 MB, of {tmp_path}"
    found.copy(tmp_path / "there")
    assert sorted(file.name for file in (tmp_path / "there").rglob("*.*")) == [
        "mine.py", "requirements.txt", "runs.py", "runs_of.py"]  # fmt: skip


def test_names_and_paths_are_ignored(tmp_path: Path) -> None:
    recipe = written(tmp_path, "mine.py", "a.ckpt", "lib/b.ckpt", "data/c", "lib/data/d", "lib/old/e")
    assert read_code(recipe, ignore=("*.ckpt", "lib/old/", "data")).files == ("mine.py",)
    assert read_code("else/mine.py", str(tmp_path), ("data", "old")).files == ("a.ckpt", "lib/b.ckpt", "mine.py")


def test_a_recipe_that_is_not_among_it_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "other.py")
    with pytest.raises(UserError, match=r"and mine\.py is not in it; give --source"):
        read_code("mine.py", str(tmp_path))
    with pytest.raises(UserError, match="is not in it"):
        read_code(written(tmp_path, "mine.py"), ignore=("mine.py",))


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_BYTES"])
def test_too_much_to_be_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(code, limit, {"MOST_FILES": 3, "MOST_BYTES": 3000}[limit])
    recipe = written(tmp_path, "mine.py", *(f"frames/{number}" for number in range(9)))
    with pytest.raises(UserError, match=r"too much to be brought as code \(frames: .* leave things out by --ignore"):
        read_code(recipe)
    assert read_code(recipe, ignore=("frames",)).files == ("mine.py",)
