"""The place of SageMaker on this machine: nothing that a job has saved is lost there, and what it asks for is tried."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker.fabricated import Fabricated
from tests.conftest import TINY, Cli

SETTINGS = {"recipe": TINY, "preset": "small"}


def saved(made: Fabricated, host: int, name: str) -> None:
    file = made.base(made.names[host]) / "checkpoints" / "run-1" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(name)


def kept(made: Fabricated) -> set[str]:
    return {file.name for file in (made.bucket / "checkpoints").rglob("*") if file.is_file()}


def test_checkpoints_of_a_job_that_was_cut_off_come_to_the_next(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    saved(made, 0, "a")
    saved(made, 1, "b")
    alone = Fabricated(tmp_path, 1, SETTINGS)  # nobody has collected, and there is one host less
    alone.lay_down()
    assert kept(made) == {"a", "b"}
    assert (alone.base(alone.names[0]) / "checkpoints" / "run-1" / "b").is_file()
    assert not made.base(made.names[1]).exists()
    (alone.base(alone.names[0]) / "checkpoints" / "run-1" / "a").unlink()
    alone.collect()
    assert kept(made) == {"b"}  # what a host deletes is deleted in the bucket
    (made.bucket / "checkpoints" / "run-1" / "b").unlink()  # by its owner
    alone.lay_down()
    assert kept(made) == set()


def test_a_copy_that_fails_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    made.lay_down()
    saved(made, 0, "a")
    made.collect()
    saved(made, 0, "b")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match="No space"):
        made.collect()
    assert kept(made) == {"a"}


def test_two_jobs_do_not_share_a_place(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    with made.held(), pytest.raises(UserError, match="another job runs in"), Fabricated(tmp_path, 1, SETTINGS).held():
        pass
    with made.held():
        assert (tmp_path / ".lock").exists()


def wheel(folder: Path, name: str) -> Path:
    """A package of one module that says VALUE = 7."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 7\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return file


@pytest.mark.slow
def test_a_recipe_is_brought_with_what_lies_beside_it_and_its_packages(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "beside.py").write_text("NAME = 'beside'\n")
    (mine / "mine.py").write_text("import beside\nimport only_there\n" + Path(TINY).read_text())
    (mine / "requirements.txt").write_text(f"--no-index\n{wheel(tmp_path, 'only_there')}\n")
    words = ("launch", "local", "--as-sagemaker", "mine/mine.py", "--preset", "small", "--run.length", "4st")
    done = cli(*words)
    assert done.status == 0, done.err + done.out
    base = tmp_path / "sagemaker-local" / "algo-1"
    assert {file.name for file in (base / "opt/ml/input/data/code").iterdir()} == {
        "beside.py", "mine.py", "requirements.txt"}  # fmt: skip
    assert json.loads((base / "opt/ml/input/config/hyperparameters.json").read_text())["recipe"] == '"mine.py"'
    assert subprocess.run([sys.executable, "-c", "import only_there"], capture_output=True).returncode  # not here
    left_out = cli(*words, "--ignore", "beside.py")
    assert left_out.status == 1
    assert "No module named 'beside'" in left_out.err
    (mine / "requirements.txt").write_text("--no-index\nno-such-package\n")
    refused = cli(*words)
    assert refused.status == 2
    assert "requirements.txt cannot be installed" in refused.err
    assert "no-such-package" in refused.err
    assert "Traceback" not in refused.err + refused.out


def test_data_that_a_container_would_not_find_are_refused(cli: Cli, tmp_path: Path) -> None:
    words = ("launch", "local", "--as-sagemaker", TINY, "--preset", "small", "--data.train", "shards")
    refused = cli(*words)
    assert (refused.status, refused.out) == (2, "")
    assert "shards lies on this machine, where a real container does not see it: give data as a channel" in refused.err
    assert not (tmp_path / "sagemaker-local").exists()
