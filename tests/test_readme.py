"""The README is true to the letter: its commands run, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- executed by tests/test_readme.py -->\n```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_the_commands_run_from_any_folder(block: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in block.splitlines():
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_every_command_is_either_executed_here_or_a_target_of_the_makefile() -> None:
    assert len(BLOCKS) == 7
    others = [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        if block not in BLOCKS
        for line in block.splitlines()
    ]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert others == ["make train", "make test"]
    assert all(line.removeprefix("make ") in targets for line in others)


def test_the_main_job_ends_with_one_json_object(cli, tmp_path: Path) -> None:
    """What ``make train`` runs."""
    assert "$(BIN)/dltrain demo" in (ROOT / "Makefile").read_text()
    done = cli("demo")
    assert done.status == 0, done.err
    assert set(done.result) == {"accuracy", "seconds", "samples_per_second", "run"}
    assert done.result["accuracy"] >= 0.985
    assert done.result["seconds"] < 60
    assert "tensorboard --logdir" in done.out
    assert (tmp_path / done.result["run"] / "report" / "evaluation.html").is_file()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/guide.md",
        "docs/sagemaker.md",
        "docs/launching.md",
        "docs/architecture.md",
        "benchmarks/results/README.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_rooms_import_from_their_own_floor_or_below() -> None:
    floors = {"errors": 1, "config": 1, "storage": 1, "runtime": 1, "task": 2, "mesh": 2, "data": 2, "optim": 2}
    floors |= {"degrees": 2}
    floors |= {
        "metrics": 2,
        "parallel": 3,
        "models": 3,
        "checkpoint": 4,
        "hooks": 4,
        "debugger": 4,
        "tensorboard": 4,
        "profiling": 4,
        "readings": 4,
        "evaluation": 4,
    }
    floors |= {
        "run_folder": 4,
        "trainer": 5,
        "job": 6,
        "job_data": 6,
        "job_hooks": 6,
        "job_process": 6,
        "job_run": 6,
        "verification": 6,
        "planning": 6,
        "recipes": 6,
        "sagemaker": 6,
        "doctor": 6,
        "cli": 6,
        "testing": 6,
    }
    for file in (ROOT / "dltrain").rglob("*.py"):
        room = file.relative_to(ROOT / "dltrain").parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        source = file.read_text().partition("if TYPE_CHECKING:")
        # what stands under TYPE_CHECKING names types only and is not imported
        body = source[0] + re.sub(r"^\n?(    .*\n)+", "", source[2])
        for target in re.findall(r"^\s*(?:from|import) dltrain\.(\w+)", body, re.MULTILINE):
            assert floors[target] <= floors[room], f"{file.name} ({room}) imports {target} from a higher floor"
