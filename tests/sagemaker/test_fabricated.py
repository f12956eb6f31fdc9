"""The place of SageMaker on this machine: nothing that a job has saved is lost there, and what it asks for is tried."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker import holding
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.holding import held
from tests.conftest import TINY

SETTINGS = {"recipe": TINY, "preset": "small"}


def saved(made: Fabricated, host: int, name: str) -> None:
    file = made.base(made.names[host]) / "checkpoints" / "run-1" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(name)


def kept(made: Fabricated) -> set[str]:
    return {file.name for file in (made.bucket / "checkpoints").rglob("*") if file.is_file()}


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, function: str) -> Iterator[None]:
    """One that this function meets."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(function, full)
        yield


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
    with full_disk(monkeypatch, "shutil.copy2"), pytest.raises(OSError, match="No space"):
        made.collect()
    assert kept(made) == {"a"}
    with full_disk(monkeypatch, "pathlib.Path.rename"), pytest.raises(OSError, match="No space"):
        made.collect()
    assert kept(made) == {"a"}
    made.lay_down()
    assert kept(made) == {"a", "b"}


def test_a_death_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    made.lay_down()
    saved(made, 0, "a")
    made.collect()
    (made.bucket / "checkpoints").rename(made.bucket / ".checkpoints-before")  # and the new ones have not come
    made.lay_down()
    assert kept(made) == {"a"}


def test_hosts_that_were_not_laid_down_to_the_end_take_nothing_from_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    saved(made, 0, "a")
    made.collect()
    with full_disk(monkeypatch, "shutil.copytree"), pytest.raises(OSError, match="No space"):
        made.lay_down()
    assert made.base(made.names[0]).is_dir()
    made.lay_down()
    assert kept(made) == {"a"}


def text(made: Fabricated, name: str) -> str:
    return (made.bucket / "checkpoints" / "run-1" / name).read_text()


def test_a_host_that_left_a_file_alone_does_not_undo_what_another_made_of_it(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    for name in ("record", "old", "both"):
        saved(made, 0, name)
    made.collect()
    made.lay_down()
    first, second = (made.base(host) / "checkpoints" / "run-1" for host in made.names)
    assert {file.name for file in second.iterdir()} == {"record", "old", "both"}
    (first / "record").write_text("newer")
    (first / "old").unlink()
    (second / "both").write_text("of the second")
    (first / "both").write_text("of the first, later")
    os.utime(second / "both", (1, 1))
    known = (tmp_path / ".given.json").read_text()
    for _ in range(2):
        Fabricated(tmp_path, 2, SETTINGS).collect()
        assert kept(made) == {"record", "both"}
        assert (text(made, "record"), text(made, "both")) == ("newer", "of the first, later")
        (tmp_path / ".given.json").write_text(known)  # as by one that was cut off before it had noted that


def test_of_model_and_output_too_the_newer_of_two_files_stays(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    for host, seconds in zip(made.names, (20, 10), strict=True):
        file = made.base(host) / "model" / "model.json"
        file.write_text(host)
        os.utime(file, (seconds, seconds))
    made.collect()
    assert (made.bucket / "model" / "model.json").read_text() == made.names[0]
    made.lay_down()
    made.collect()
    assert not list((made.bucket / "model").iterdir())  # of this job alone


def test_two_jobs_do_not_share_a_place(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(UserError, match="another job runs in"), held(tmp_path):
        pass
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("by", ["lock", "variable"])
def test_a_place_is_taken_until_the_last_process_of_its_hosts_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], by: str
) -> None:
    made = Fabricated(tmp_path, 1, SETTINGS)
    with held(tmp_path) as lock:
        kept = {"pass_fds": (lock,)} if by == "lock" else {"env": {**os.environ, **made.variables(made.names[0])}}
        host: subprocess.Popen[bytes] = subprocess.Popen(["sleep", "60"], **kept)  # type: ignore[call-overload]
    try:
        monkeypatch.setattr(holding, "PATIENCE", 0.1)
        with pytest.raises(UserError, match="another job runs in"), held(tmp_path):
            pass
        monkeypatch.setattr(holding, "PATIENCE", 30)
        threading.Timer(0.5, host.kill).start()
        threading.Thread(target=host.wait).start()
        capfd.readouterr()
        with held(tmp_path):
            assert host.wait() == -signal.SIGKILL
    finally:
        host.kill()
    assert capfd.readouterr().err.count("are still ending; waiting for them") == 1


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
