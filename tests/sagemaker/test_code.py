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
    assert read_code(recipe, str(tmp_path), ("data", "old")).files == ("a.ckpt", "lib/b.ckpt", "mine.py")


def test_a_recipe_that_is_not_among_it_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "there", "mine.py")  # another one of that name, which would be run
    elsewhere = written(tmp_path / "here", "mine.py")
    with pytest.raises(UserError, match=r"here/mine\.py is not in it; give --source"):
        read_code(elsewhere, str(tmp_path / "there"))
    with pytest.raises(UserError, match="is not in it: a pattern leaves it out"):
        read_code(elsewhere, ignore=("mine.py",))


def test_a_recipe_may_lie_anywhere_in_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "source", "recipes/mine.py", "lib.py")
    (tmp_path / "linked").symlink_to(tmp_path / "source")
    monkeypatch.chdir(tmp_path / "source")
    for recipe, source in (
        ("recipes/mine.py", "."),
        ("recipes/mine.py", str(tmp_path / "source")),
        ("recipes/mine.py", str(tmp_path / "linked")),
        (str(tmp_path / "linked/recipes/mine.py"), "."),
        ("../linked/recipes/mine.py", "../source"),
    ):
        found = read_code(recipe, source)
        assert (found.recipe, found.files) == ("recipes/mine.py", ("lib.py", "recipes/mine.py"))
    assert (read_code("recipes/mine.py").recipe, read_code("./recipes/mine.py").files) == ("mine.py", ("mine.py",))


def test_links_are_followed_and_those_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    recipe = written(tmp_path / "source", "mine.py")
    written(tmp_path / "else", "package/a.py", "package/deep/b.py", "single.py")
    (tmp_path / "source/package").symlink_to(tmp_path / "else/package", target_is_directory=True)
    (tmp_path / "source/single.py").symlink_to("../else/single.py")
    (tmp_path / "source/linked.py").symlink_to("mine.py")
    found = read_code(recipe)
    assert found.files == ("linked.py", "mine.py", "package/a.py", "package/deep/b.py", "single.py")
    found.copy(tmp_path / "there")
    assert not any(file.is_symlink() for file in (tmp_path / "there").rglob("*"))
    assert read_code(str(tmp_path / "source/linked.py")).recipe == "linked.py"
    (tmp_path / "source/lost").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"lost is a link to nowhere, which there is not; .* by --ignore lost"):
        read_code(recipe)
    assert read_code(recipe, ignore=("lost",)).files == found.files


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_that_it_lies_in_is_refused(tmp_path: Path, target: str) -> None:
    recipe = written(tmp_path / "source", "mine.py", "lib/a.py")
    (tmp_path / "source/lib/again").symlink_to(target, target_is_directory=True)
    with pytest.raises(UserError, match=r"again is a link to a folder that it lies in; .* --ignore lib/again"):
        read_code(recipe)
    assert read_code(recipe, ignore=("again",)).files == ("lib/a.py", "mine.py")


def test_fabricated_hosts_are_no_code(tmp_path: Path) -> None:
    places = ("trial/", "")  # beside the recipe, and the folder that it lies in
    hosts = [f"{place}{name}" for place in places for name in (".lock", "algo-1/opt/ml/x", "algo-2/y", "s3/model/z")]
    recipe = written(tmp_path, "mine.py", "trial/lib.py", "lib/algo-1/opt/a.py", "lib/s3/b.py", *hosts)
    assert read_code(recipe).files == ("lib/algo-1/opt/a.py", "lib/s3/b.py", "mine.py", "trial/lib.py")


@pytest.mark.parametrize("limit", ["MOST_FILES", "MOST_BYTES"])
def test_too_much_to_be_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(code, limit, {"MOST_FILES": 3, "MOST_BYTES": 3000}[limit])
    recipe = written(tmp_path, "mine.py", *(f"frames/{number}" for number in range(9)))
    with pytest.raises(UserError, match=r"too much to be brought as code \(frames: .* leave things out by --ignore"):
        read_code(recipe)
    assert read_code(recipe, ignore=("frames",)).files == ("mine.py",)
