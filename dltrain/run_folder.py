"""A run on disk: its folder, ``run.json``, and which runs there are. Imports no torch.

runs/<name>/run.json  config.yaml  recipe.py  metrics.jsonl  tensorboard/  checkpoints/  debugger/  report/
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dltrain import storage
from dltrain.config import Config
from dltrain.errors import UserError, nearest

if TYPE_CHECKING:
    from dltrain.data.reader import Dataset

RECORD = "run.json"
LOCK = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record(self) -> Path:
        return self.path / RECORD

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Samples that were bad and replaced, a file for each rank that met any."""
        return self.path / "quarantine"

    @property
    def debugger(self) -> Path:
        """Statistics of tensors and findings of rules."""
        return self.path / "debugger"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.py"

    @property
    def is_free(self) -> bool:
        """Whether a fresh run may take this name: nothing is there, or a run that failed before it saved anything."""
        if not self.record.is_file():
            return not self.path.exists() or {entry.name for entry in self.path.iterdir()} <= {LOCK}
        return self.read()["status"] == "failed" and not any(self.checkpoints.glob("step-*"))

    def read(self) -> dict[str, Any]:
        """``run.json``. Raises :class:`UserError` when this is no run."""
        if not self.record.is_file():
            raise UserError(f"{self.path} is not a run: it has no {RECORD}")
        try:
            return dict(json.loads(self.record.read_text()))
        except ValueError as error:
            raise UserError(f"{self.record} is damaged: {error}") from None

    def claim(self) -> IO[str]:
        """Make the folder and hold it until the returned file is closed or this process ends, however it does.

        Raises :class:`UserError` when another process holds it or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"the run {self.path} is being trained by another process; wait, or stop it") from None
        except OSError as error:
            raise UserError(f"cannot make the run's folder {self.path}: {error.strerror}") from None
        return file

    @property
    def is_held(self) -> bool:
        """Whether a process on this host is training it now."""
        if not (self.path / LOCK).is_file():
            return False
        with (self.path / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def update(self, **changes: Any) -> None:
        """Replace fields of ``run.json`` at once."""
        record = self.read() if self.record.is_file() else {}
        storage.write(str(self.record), (json.dumps({**record, **changes}, indent=1) + "\n").encode())


def choose_run(config: Config, recipe: str, preset: str, moved: bool = False) -> RunFolder:
    """The folder this run is to use: a fresh one, or with ``run.resume`` the one to go on with. Makes nothing.

    Where the user's recipe may have ``moved`` since an earlier run, its file's name counts and not its folder. Raises
    :class:`UserError` when a fresh run would overwrite one, or there is nothing to resume.
    """
    run = config.run
    if "://" in run.folder:
        raise UserError(f"run.folder is {run.folder!r}: runs are written to a local folder")
    folder = Path(run.folder).expanduser()
    if run.resume not in ("never", "auto"):
        return _named(run.resume, folder)
    if run.name:
        if run.name.startswith(".") or set(run.name) & set("/\\\0"):
            raise UserError(f"run.name is {run.name!r}: it names one folder, without / or \\ or a leading dot")
        chosen = RunFolder(folder / run.name)
        if run.resume == "never" and not chosen.is_free:
            raise UserError(f"the run {chosen.path} exists; choose another run.name, or go on with: --run.resume auto")
        return chosen
    if run.resume == "auto":
        for candidate in reversed(all_runs(folder)):
            record = candidate.read()
            same = _is_same(record["recipe"], recipe, moved) and record["preset"] == preset
            if same and record["status"] != "finished":
                return candidate
    return _fresh(folder, recipe, preset)


def all_runs(folder: Path) -> list[RunFolder]:
    """Every run below ``folder``, oldest first."""
    created: list[tuple[float, str, RunFolder]] = []
    for path in folder.glob(f"*/{RECORD}"):
        run = RunFolder(path.parent)
        try:
            created.append((run.read().get("created", 0), run.name, run))
        except UserError as error:
            print(f"warning: passing over {run.path}: {error}", file=sys.stderr)
    return [run for _, _, run in sorted(created, key=lambda entry: entry[:2])]


def find_run(name: str, folder: str = "runs") -> RunFolder:
    """A run by its path or by its name in ``folder``. Raises :class:`UserError`."""
    return _named(name, Path(folder).expanduser())


def first_record(config: Config, recipe: str, preset: str, world_size: int, dataset: Dataset) -> dict[str, Any]:
    """What ``run.json`` says when a run starts: config, versions, source, hardware, data."""
    return {
        "recipe": recipe,
        "preset": preset,
        "status": "running",
        "created": round(time.time(), 3),
        "config": config.model_dump(mode="json"),
        "dataset_fingerprint": dataset.fingerprint,
        "facts": dataset.facts,
        "world_size": world_size,
        "versions": {name: _version(name) for name in ("dltrain", "torch", "torchvision", "numpy")},
        "python": platform.python_version(),
        "hardware": {"machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count()},
        "git": _git_commit(),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _named(name: str, folder: Path) -> RunFolder:
    for candidate in (RunFolder(Path(name)), RunFolder(folder / name)):
        if candidate.record.is_file():
            return candidate
    names = [run.name for run in all_runs(folder)]
    raise UserError(f"there is no run {name!r} here or in {folder}; {nearest(name, names)}")


def _is_same(one: str, other: str, moved: bool) -> bool:
    if moved and one.endswith(".py"):
        return Path(one).name == Path(other).name
    return one == other


def _fresh(folder: Path, recipe: str, preset: str) -> RunFolder:
    stem = "-".join(part for part in (Path(recipe).stem, preset, time.strftime("%Y%m%d-%H%M%S")) if part)
    path, count = folder / stem, 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}"
    return RunFolder(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
