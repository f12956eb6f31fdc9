"""Recipes of the user's own: what their declarations may use, and what is said when they do not run."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dltrain.errors import UserError
from dltrain.hooks.base import Hook
from dltrain.recipes import declarations
from tests.conftest import TINY, Cli

HEAD = """
import os
import torch
from typing import Literal
from dltrain import Config, Section, Task, main, preset
"""
BODY = """
HIDDEN = 32
Kind = Literal["a", "b"]

class MyModel(Section):
    hidden: int = HIDDEN
    kind: Kind = "a"

class MyConfig(Config):
    model: MyModel = MyModel()

def base(name):
    return MyConfig(run={"name": os.path.basename(name)})

@preset
def small():
    '''Small.'''
    return base("x/y")

WEIGHTS = torch.zeros(3)

class MyTask(Task):
    pass

if __name__ == "__main__":
    main(MyTask)
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_declarations_may_use_constants_helpers_and_the_standard_library(tmp_path: Path) -> None:
    code = (
        "import sys; from dltrain.recipes import declarations\n"
        "config = declarations(sys.argv[1]).configure('small', {'model.kind': 'b'})\n"
        "assert (config.model.hidden, config.model.kind, config.run.name) == (32, 'b', 'y')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, write(tmp_path, HEAD + BODY)], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("main(MyTask)", "pass"), "never calls main"),
        (('return base("x/y")', "return MyConfig(rnu={})"), "preset 'small' of .*rnu"),
        (('return base("x/y")', "return undefined"), "preset 'small' of .*does not run: name 'undefined'"),
        (
            ("hidden: int = HIDDEN", "hidden: int"),
            r"MyModel cannot be made .*: --hidden: field required",
        ),
        (("HIDDEN = 32", "HIDDEN = 1 / 0"), "division by zero"),
        (("HIDDEN = 32", "HIDDEN = = 32"), "syntax error in line"),
    ],
)
def test_a_recipe_at_fault_is_told_in_a_sentence(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = write(tmp_path, (HEAD + BODY).replace(*change))
    with pytest.raises(UserError, match=message) as caught:
        declarations(path).configure("small", {})
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="as text"):
        declarations(str(tmp_path / "mine.py"))


def test_a_misspelt_event_is_refused() -> None:
    with pytest.raises(UserError, match=r"'evaluation_ended', which no event calls; is it 'evaluation_end'"):

        class Mine(Hook):
            def evaluation_ended(self) -> None: ...


@pytest.mark.slow
def test_a_run_is_resumed_by_path_with_its_own_config_and_evaluated_from_elsewhere(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(TINY).read_text())
    first = cli(
        "train", "mine.py", "--preset", "small", "--run.name", "x", "--model.width", "24", "--run.length", "8st"
    )
    assert first.status == 0, first.err
    resumed = cli("train", "mine.py", "--run.resume", "runs/x", "--run.length", "12st")
    assert resumed.status == 0, resumed.err
    assert resumed.result["step"] == 12
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "dltrain", "eval", "../runs/x"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "x" / "recipe.py").read_text() == Path(TINY).read_text()


@pytest.mark.parametrize("name", ["a/b", "../x", ".hidden"])
def test_a_run_name_is_the_name_of_one_folder(cli: Cli, tmp_path: Path, name: str) -> None:
    done = cli("train", TINY, "--preset", "small", "--run.name", name)
    assert done.status == 2
    assert "it names one folder" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_does_not_use_up_the_name_of_a_run(cli: Cli, tmp_path: Path) -> None:
    train = ["train", TINY, "--preset", "small", "--run.name", "x", "--run.length", "4st"]
    assert cli(*train, "--schedule.warmup", "99st").status == 2
    assert not (tmp_path / "runs" / "x").exists()
    assert cli(*train, TINY_NAN="1").status == 2
    assert cli(*train).status == 0


@pytest.mark.slow
def test_a_run_has_one_trainer_at_a_time_and_a_dead_one_is_seen(cli: Cli, tmp_path: Path) -> None:
    train = ["train", TINY, "--preset", "small", "--run.name", "x"]
    command = [sys.executable, "-m", "dltrain", *train, "--run.length", "100000st", "--checkpoint.every", "0st"]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while "step 1/" not in (first.stderr.readline() if first.stderr else ""):
        assert first.poll() is None
    second = cli(*train, "--run.resume", "auto")
    assert second.status == 2
    assert "is being trained by another process" in second.err
    assert json.loads((tmp_path / "runs/x/run.json").read_text())["status"] == "running"
    subprocess.run(["pkill", "-KILL", "-P", str(first.pid)], check=True)
    first.wait()
    assert " died " in cli("runs", "ls").out


@pytest.mark.slow
def test_on_a_terminal_progress_is_live_and_the_result_is_whole(tmp_path: Path) -> None:
    """Standard error is a terminal, standard output a file: what `dltrain train ... > result.json` sees."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dltrain", "train", TINY, "--preset", "small", "--nproc", "2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=theirs, env=environment)
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            seen += chunk
            if not chunk:
                break
        assert process.wait() == 0
    assert json.loads((tmp_path / "out").read_text())["step"] == 16
    text = seen.decode()
    assert "16/16" in text
    assert "evaluation at step 8" in text
    assert "finished 16 steps" in text


def test_photos_of_any_size_are_classified_as_they_lie_in_folders(tmp_path: Path, cli: Cli) -> None:
    rng = np.random.default_rng(0)
    for number in range(96):
        kind = ("dark", "light")[number % 2]
        file = tmp_path / "photos" / kind / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
        pixels = rng.integers(0, 90, shape) + (120 if kind == "light" else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    photos = str(tmp_path / "photos")
    words = ["--data.train", photos, "--data.evaluation", photos, "--model.image", "jpg", "--model.classes", "2"]
    words += ["--model.size", "16", "--model.crop", "true", "--run.length", "6ep", "--data.global_batch_size", "16"]
    refused = cli("train", "image/classify", *words)
    assert refused.status == 2
    assert "pieces cut from images are in colour; set model.channels 3" in refused.err
    done = cli("train", "image/classify", *words, "--model.channels", "3", "--data.decode", "device", "--nproc", "2")
    assert done.status == 0, done.err
    assert done.result["accuracy"] > 0.9
    assert "data.decode is device, but there is no GPU: images are decoded by the host" in done.err + done.out
