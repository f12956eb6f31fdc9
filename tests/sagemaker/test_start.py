"""What a host runs: its data, its ranks by its GPUs, and the packages that the user's code asks for."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from dltrain.errors import UserError
from dltrain.sagemaker import start
from dltrain.sagemaker.fabricated import Fabricated
from dltrain.sagemaker.start import gpus, install_requirements, read_start
from dltrain.sagemaker.training_job import TrainingJob
from tests.conftest import ROOT, TINY


def made_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], **channels: Path
) -> TrainingJob:
    """A job of one host as its container finds it."""
    made = Fabricated(tmp_path, 1, {"recipe": TINY, "preset": "small", **settings}, channels)
    made.lay_down()
    for name, value in made.variables(made.names[0]).items():
        monkeypatch.setenv(name, value)
    job = TrainingJob.read()
    assert job is not None
    return job


def test_a_channel_counts_over_the_preset_and_a_hyperparameter_over_the_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    job = made_job(tmp_path, monkeypatch, {"nproc": 1}, train=tmp_path / "data")
    assert read_start(job, ()).config.data.train == str(job.channels["train"].folder)
    given = read_start(job, ("--data.train", "s3://data/digits"))
    assert given.config.data.train == "s3://data/digits"
    job = made_job(tmp_path, monkeypatch, {"nproc": 1, "data__train": "s3://data/digits"}, train=tmp_path / "data")
    assert read_start(job, ()).config.data.train == "s3://data/digits"


def program(folder: Path, name: str, text: str) -> str:
    """A command of that name first on the path that is returned."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("exit 0", "nvidia-smi lists none"),
        ("echo 'Failed to initialize NVML'; exit 9", "nvidia-smi ended with status 9: Failed to initialize NVML"),
        ("echo 'GPU 0: H100'; echo 'GPU 1 is lost' >&2; exit 15", "nvidia-smi ended with status 15: GPU 1 is lost"),
        ("exec sleep 9", "nvidia-smi has not answered within 0.2 s"),
    ],
)
def test_an_instance_whose_gpus_are_not_seen_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, seen: str
) -> None:
    monkeypatch.setattr(start, "PATIENCE", 0.2)
    monkeypatch.setenv("PATH", program(tmp_path, "nvidia-smi", text))
    for kind in ("ml.p5.48xlarge", "ml.g4dn.xlarge", "ml.g5g.xlarge", "ml.p6-b200.48xlarge", "p3dn.24xlarge"):
        with pytest.raises(UserError, match=f"{kind} has GPUs, and none are seen here: {seen}"):
            gpus(kind)
    for kind in ("ml.m5.xlarge", "ml.c6i.xlarge", ""):
        assert gpus(kind) == 0


def test_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "echo 'GPU 0: NVIDIA H100'; echo '  MIG 1g.10gb'; echo 'GPU 1: NVIDIA H100'"
    monkeypatch.setenv("PATH", program(tmp_path, "nvidia-smi", listed))
    assert gpus("ml.p5.48xlarge") == 2


def test_a_job_on_gpus_that_are_not_there_ends_before_anything_is_started(tmp_path: Path) -> None:
    made = Fabricated(tmp_path, 1, {"recipe": TINY, "preset": "small"}, instance_type="ml.p5.48xlarge")
    made.lay_down()
    path = program(tmp_path / "bin", "nvidia-smi", "exit 9")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **made.variables(made.names[0])}
    done = subprocess.run([sys.executable, "-m", "dltrain.sagemaker"], env=variables, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert made.failure(made.names[0]).startswith("ml.p5.48xlarge has GPUs, and none are seen here")


def wheel(folder: Path, name: str, number: str, needs: str = "") -> None:
    """A package with nothing in it."""
    folder.mkdir(exist_ok=True)
    facts = f"{name}-{number}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as archive:
        required = f"Requires-Dist: {needs}\n" if needs else ""
        archive.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{required}")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{facts}/RECORD", "")


def asking(job: TrainingJob, wheels: Path, *packages: str) -> TrainingJob:
    """The job, whose code asks for packages of a folder alone."""
    file = job.folders.base / "code" / "requirements.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("--no-index", f"--find-links {wheels}", *packages)))
    return job


def test_the_images_torch_stays_whatever_the_code_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # nothing of this is installed
    job = made_job(tmp_path, monkeypatch, {})
    wheels = tmp_path / "wheels"
    wheel(wheels, "torch", "99.0")
    wheel(wheels, "numpy", "99.0")
    wheel(wheels, "plain", "1.0", f"torch>={version('torch').partition('+')[0]}")
    wheel(wheels, "ahead", "1.0", "torch>=99")
    install_requirements(asking(job, wheels, "plain"))
    for package in ("ahead", "torch==99.0", "numpy==99.0"):
        with pytest.raises(UserError, match=r": Cannot install .* conflicting dependencies.*; torch=="):
            install_requirements(asking(job, wheels, package))
    with pytest.raises(UserError, match="Could not find a version that satisfies the requirement nothing"):
        install_requirements(asking(job, wheels, "nothing"))


def test_uv_installs_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    job = asking(made_job(tmp_path, monkeypatch, {}), tmp_path, "plain")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"the image has neither pip nor uv; put one of them into it, or the packages$"):
        install_requirements(job)
    told = tmp_path / "told"
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "uv", f'echo "$@" > {told}; cat "$7" >> {told}'))
    install_requirements(job)
    words, *kept = told.read_text().splitlines()
    assert words.startswith(f"pip install --python {sys.executable} --quiet --constraint ")
    assert words.endswith(f"--requirement {job.folders.base}/code/requirements.txt")
    assert f"torch=={version('torch')}" in kept
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "uv", "printf '  x No solution:\\n  because\\n' >&2; exit 1"))
    with pytest.raises(UserError, match="cannot be installed: x No solution: because; torch=="):
        install_requirements(job)
