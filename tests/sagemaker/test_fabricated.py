"""The place of SageMaker on this machine: nothing that a job has saved is lost there, and what it asks for is tried."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dltrain.cli import launch_local
from dltrain.errors import UserError
from dltrain.sagemaker import holding
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.holding import held
from tests.conftest import TINY, Cli
from tests.sagemaker.test_supervisor import until

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


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_host_does_not_stand_still_where_its_lines_cannot_be_printed(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    lines = [sys.executable, "-c", "print('a line of a host\\n' * 100_000)"]
    host = subprocess.Popen(lines, stdout=subprocess.PIPE, text=True)
    monkeypatch.setattr(sys, "stdout", Gone())
    launch_local.prefixed("algo-1", host).join(30)
    try:
        assert host.wait(10) == 0
    finally:
        host.kill()


def test_a_host_that_was_killed_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    assert launch_local.told(made, {made.names[0]: -signal.SIGKILL, made.names[1]: 1}) == 128 + 9
    said = capsys.readouterr()
    assert "algo-1 was ended by SIGKILL" in said.err
    assert "algo-2 ended with status 1: it left no reason" in said.err
    assert not said.out


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--channel", "tr/ain=."), "a channel is named 'tr/ain'; give 1 to 64 letters, digits, dots, dashes"),
        (("--channel", "../x=."), "a channel is named '../x'"),
        (("--channel", "..=."), "a channel is named '..'"),
        (("--channel", "=."), "a channel is named ''"),
        (("--channel", "a" * 65 + "=."), "give 1 to 64 letters"),
        (("--instance-type", "ml.p5.48xlarg"), "--instance-type is 'ml.p5.48xlarg'; did you mean 'ml.p5.48xlarge'?"),
        (("--instance-type", "ml.foo"), "--instance-type is 'ml.foo'; there are: "),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        launch_local.run(["--as-sagemaker", TINY, "--preset", "small", *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option",
    [("--base", "there"), ("--instance-type", "ml.m5.xlarge"), ("--hosts", "2"), ("--hosts", "0"), ("--source", ".")],
    ids=" ".join,
)
def test_options_of_containers_are_refused_without_them(option: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=f"{option[0]}: options of containers; add --as-sagemaker"):
        launch_local.run([TINY, "--preset", "small", *option])


def test_code_that_lies_on_a_host_is_not_deleted_with_it(tmp_path: Path) -> None:
    code = tmp_path / "algo-1" / "opt" / "ml" / "input" / "data" / "code"
    code.mkdir(parents=True)
    recipe = shutil.copy(TINY, code)
    with pytest.raises(UserError, match="which is made anew for each job; copy your code out"):
        launch_local.run(["--as-sagemaker", recipe, "--preset", "small", "--base", str(tmp_path)])
    assert Path(recipe).is_file()


@pytest.mark.slow
def test_a_place_beside_the_recipe_is_no_code_the_second_time(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    shutil.copy(TINY, tmp_path / "recipes" / "mine.py")
    words = ("launch", "local", "--as-sagemaker", "recipes/mine.py", "--source", ".", "--base", "trial")
    for length in ("4st", "6st"):
        done = cli(*words, "--preset", "small", "--run.length", length)
        assert done.status == 0, done.err + done.out
        brought = tmp_path / "trial/algo-1/opt/ml/input/data/code"
        assert [file.relative_to(brought).as_posix() for file in brought.rglob("*.py")] == ["recipes/mine.py"]


@contextmanager
def launched(folder: Path, *words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """``dltrain launch local --as-sagemaker`` there; its hosts end with it."""
    command = [sys.executable, "-m", "dltrain", "launch", "local", "--as-sagemaker", *words]
    environment = {**os.environ, **variables}
    with subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def metrics(folder: Path, place: str) -> int:
    """Lines of the run's, so far: in the place of S3, or on a host."""
    files = list((folder / "sagemaker-local").glob(f"{place}/checkpoints/*/metrics.jsonl"))
    return files[0].read_text().count("\n") if files else 0


@pytest.mark.slow
def test_what_the_bucket_says_of_a_resumed_run_is_how_it_ended(cli: Cli, tmp_path: Path) -> None:
    words = ("--hosts", "2", TINY, "--preset", "small", "--evaluation.every", "0st")
    with launched(tmp_path, *words, TINY_PAUSE="0.5") as job:
        until(lambda: metrics(tmp_path, "algo-1/opt/ml") > 4)
        job.terminate()
        printed = job.communicate(timeout=60)[0]
        assert job.returncode == 75, printed
    assert 4 < metrics(tmp_path, "s3") < 16
    done = cli("launch", "local", "--as-sagemaker", *words)
    assert done.status == 0, done.err
    assert "resumed at step" in done.out
    (record,) = (tmp_path / "sagemaker-local" / "s3" / "checkpoints").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "finished"
    assert metrics(tmp_path, "s3") == 16


@pytest.mark.slow
def test_after_a_launcher_that_was_killed_the_next_loses_nothing(cli: Cli, tmp_path: Path) -> None:
    words = ("--hosts", "2", TINY, "--preset", "small", "--checkpoint.every", "0st", "--evaluation.every", "0st")
    with launched(tmp_path, *words, TINY_PAUSE="1") as job:
        until(lambda: metrics(tmp_path, "algo-1/opt/ml") > 4)
        seen = metrics(tmp_path, "algo-1/opt/ml")
        job.kill()
    done = cli("launch", "local", "--as-sagemaker", *words)
    assert done.status == 0, done.err
    assert "are still ending; waiting for them" in done.err
    (step,) = re.findall(r"resumed at step (\d+)", done.out)
    assert int(step) >= seen


@pytest.mark.slow
def test_a_reader_that_goes_away_takes_nothing_with_it(tmp_path: Path) -> None:
    command = f"{sys.executable} -m dltrain launch local --as-sagemaker {TINY} --preset small --run.length 4st"
    shell = ["bash", "-c", f"{command} 2> told | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    told = (tmp_path / "told").read_text()
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), told
    assert "algo-1 ended well" in told
    assert "BrokenPipe" not in told
