"""The wheel carries recipes and launch files inside the package, and works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_only_the_package_is_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dltrain"}
    assert {"dltrain/recipes/image/classify.py", "dltrain/recipes/timeseries/forecast.py"} <= set(names)
    files = ("torchrun.sh", "slurm.sbatch", "kubernetes.yaml", "Dockerfile", "cloudformation.yaml")
    assert {f"dltrain/launch/{file}" for file in files} <= set(names)


def test_an_unpacked_wheel_lists_and_runs_its_recipes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "dltrain", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = [sys.executable, "-c", "import dltrain; print(dltrain.__file__)"]
    assert subprocess.run(where, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout.startswith(
        str(site)
    )
    assert "image/classify" in run("recipe", "ls")
    assert "#SBATCH --nodes=2" in run("launch", "slurm", "image/classify", "--preset", "digits", "--nodes", "2")
    assert '"accuracy"' in run("train", "image/classify", "--preset", "digits", "--run.length", "1ep")


@pytest.mark.slow
def test_a_new_environment_with_the_wheel_alone_runs_a_recipe(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{wheel}[examples]"]
    subprocess.run(install, check=True, timeout=280)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    for words in (["recipe", "ls"], ["train", "timeseries/forecast", "--preset", "co2", "--run.length", "2ep"]):
        command = [str(tmp_path / "env" / "bin" / "dltrain"), *words]
        assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
