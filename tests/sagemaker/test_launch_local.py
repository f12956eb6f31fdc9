"""``dltrain launch local --as-sagemaker``: what it refuses, what it brings, how it ends and goes on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dltrain.cli import launch_local
from dltrain.errors import UserError
from dltrain.runtime.word import Failure
from dltrain.sagemaker.code import read_code
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.failure import reason
from tests.conftest import TINY, Cli
from tests.sagemaker.test_fabricated import SETTINGS, wheel
from tests.sagemaker.test_supervisor import until


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


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ((1, "RuntimeError: Connection closed by peer [127.0.0.2]:4711"), (7, "rank 3 on algo-2: SystemExit."), 7),
        ((130, ""), (1, "rank 1 on algo-2: no space left."), 1),
        ((1, "RuntimeError: Connection closed by peer [127.0.0.2]:4711"), (130, ""), 130),
        ((75, ""), (1, "RuntimeError: Connection closed by peer [127.0.0.2]:4711"), 1),
        ((3, "rank 0: no."), (7, "rank 1: no."), 3),
    ],
)
def test_the_status_is_that_of_the_host_to_blame(
    tmp_path: Path, first: tuple[int, str], second: tuple[int, str], status: int
) -> None:
    made = Fabricated(tmp_path, 2, SETTINGS)
    made.lay_down()
    for host, (_, said) in zip(made.names, (first, second), strict=True):
        failure = Failure(0, said, 1, error=said)
        if said:
            (made.base(host) / "output" / "failure").write_text(reason(failure, host, made.names))
    assert launch_local.told(made, dict(zip(made.names, (first[0], second[0]), strict=True))) == status


@pytest.mark.slow
def test_a_recipe_is_brought_with_what_lies_beside_it_and_its_packages(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "beside.py").write_text("NAME = 'beside'\n")
    (mine / "mine.py").write_text("import beside\nimport only_there\n" + Path(TINY).read_text())
    (mine / "requirements.txt").write_text(f"--no-index\n./{wheel(mine, 'only_there').name}\n")
    words = ("launch", "local", "--as-sagemaker", "mine/mine.py", "--preset", "small", "--run.length", "4st")
    done = cli(*words)
    assert done.status == 0, done.err + done.out
    base = tmp_path / "sagemaker-local" / "algo-1"
    assert {file.name for file in (base / "opt/ml/input/data/code").iterdir()} == {
        "beside.py", "mine.py", "requirements.txt", "only_there-1.0-py3-none-any.whl"}  # fmt: skip
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


def test_what_is_ignored_adds_up_and_commas_divide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TINY, tmp_path / "mine.py")
    for file in ("a.ckpt", "b.bin", "c.txt", "kept.md"):
        (tmp_path / file).touch()

    def told(recipe: str, source: str, ignore: list[str]) -> None:
        raise UserError(" ".join(read_code(recipe, source, ignore).files))

    monkeypatch.setattr(launch_local, "read_code", told)
    words = ["--as-sagemaker", "mine.py", "--preset", "small", "--ignore", "*.ckpt, *.bin", "--ignore", "c.txt"]
    with pytest.raises(UserError, match=r"^kept\.md mine\.py$"):
        launch_local.run(words)


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
        (("--channel", "a=.", "--channel", "a=/"), "channel 'a' is given twice, as . and as /; give it once"),
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
    with pytest.raises(UserError, match=f"{option[0]}: an option of containers; add --as-sagemaker, or leave it"):
        launch_local.run([TINY, "--preset", "small", *option])
    with pytest.raises(UserError, match=r"--base and --channel: options of containers; .* or leave them out"):
        launch_local.run([TINY, "--channel", "a=.", "--base", "x"])


def test_code_and_data_that_lie_on_a_host_are_not_deleted_with_it(tmp_path: Path) -> None:
    code = tmp_path / "algo-1" / "opt" / "ml" / "input" / "data" / "code"
    code.mkdir(parents=True)
    recipe = shutil.copy(TINY, code)
    for words in ([recipe], [TINY, "--channel", f"train={code}"]):
        with pytest.raises(UserError, match="which is made anew for each job; copy it elsewhere"):
            launch_local.run(["--as-sagemaker", *words, "--preset", "small", "--base", str(tmp_path)])
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
    assert metrics(tmp_path, "s3") == metrics(tmp_path, "algo-1/opt/ml") == 16 + 1  # steps, and the last evaluation


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
