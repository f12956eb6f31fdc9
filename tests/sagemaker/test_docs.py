"""docs/sagemaker.md is true to the letter: its commands run, against a local server with SageMaker's interface."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dltrain.sagemaker.options import JobOptions, read_options
from dltrain.testing.s3 import S3Server
from tests.conftest import ROOT

PAGE = (ROOT / "docs/sagemaker.md").read_text()
BLOCKS = re.findall(r"<!-- executed by tests/sagemaker/test_docs.py -->\n```sh\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [pytest.param(BLOCKS[0], marks=pytest.mark.slow, id="here"), pytest.param(BLOCKS[1], id="there")],
)
def test_the_commands_run(block: str, tmp_path: Path, s3: S3Server) -> None:
    (job,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "job.yaml").write_text(job)
    environment = {**os.environ, **s3.variables, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in block.splitlines():
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_every_command_is_executed_here_and_every_option_is_one(tmp_path: Path) -> None:
    assert len(BLOCKS) == len(re.findall(r"```sh", PAGE)) == 2
    (job,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "job.yaml").write_text(job)
    assert read_options(tmp_path / "job.yaml", {}).count == 2
    known = {"--" + name.replace("_", "-") for name in JobOptions.model_fields}
    known |= {"--as-sagemaker", "--hosts", "--nproc", "--preset", "--job", "--dry-run", "--prices", "--channel", "--s3"}
    known |= {"--sagemaker", "--stop-on-interrupt", "--help", "--run"}
    assert set(re.findall(r"--[a-z][a-z0-9-]*", PAGE)) <= known
