"""What is saved, how it is committed, found and kept.

``checkpoints/step-00000100/`` holds tensors by DCP, everything else as ``state.json``, and, written last,
``COMMITTED``: sizes and checksums of all files. A folder without it is a torn save and never taken for a whole one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import google_crc32c

from dltrain import storage
from dltrain.checkpoint.tensors import load_tensors, parts_saved, save_tensors
from dltrain.errors import UserError
from dltrain.parallel.engine import Engine
from dltrain.runtime.environment import Environment
from dltrain.runtime.logs import say, warn
from dltrain.runtime.together import barrier, from_main, gathered

COMMITTED = "COMMITTED"
STATE = "state.json"
BEST = "best.json"

OPTIONAL = {
    "ema": (
        "has no averaged weights: the average (optim.ema) starts from its weights",
        "has averaged weights, which are left aside: optim.ema is 0",
    ),
    "loss_scale": (
        "has no loss scale: precision.compute fp16 starts from the usual one",
        "has a loss scale, which is left aside: precision.compute is not fp16",
    ),
}
"""Parts of an engine's state that a checkpoint may have or not: what is said when it lacks one that is wanted, and when
it has one that is not."""


class Checkpointer:
    """Checkpoints of one run in ``folder``; the last ``keep`` and the best one stay.

    ``grace`` is how many seconds an interruption leaves: a stop that takes longer is told once. Where the folder is not
    ``shared``, each host has one of its own with what its ranks have saved, and somebody brings them together before
    the run is started again, as SageMaker does.
    """

    def __init__(
        self, folder: Path, keep: int, environment: Environment, grace: float = math.inf, shared: bool = True
    ) -> None:
        self.folder = folder
        self._shared = shared or environment.nodes == 1
        self._tidies = environment.is_main if self._shared else environment.local_rank == 0
        self.longest = 0.0
        """Seconds that the longest save so far has taken."""
        self._grace = grace
        self._keep = keep
        self._environment = environment
        self._whole: int | None = None  # the step that lies there as this process has it
        self._saved = -1
        self._checked: Path | None = None
        self._seen_by_all = environment.world_size == 1 or not self._shared

    def save(self, step: int, engine: Engine, state: dict[str, Any], before: float = 0.0) -> Path:
        """Save and commit; collective. ``state`` is JSON, equal on every rank; ``before`` are the seconds that pass
        between a signal and its save.

        A step this process has saved or resumed from is not saved again; whatever else lies under its name is replaced.
        """
        path = step_folder(self.folder, step)
        if step == self._whole:
            return path
        started, self._saved = time.monotonic(), step
        if self._tidies:
            (path / COMMITTED).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        barrier()
        save_tensors(path, engine.state_dict())
        sums = _checksums(path, [file.name for file in path.glob(f"__{self._environment.rank}_*")])
        files = {name: entry for part in gathered(sums) for name, entry in part.items()}
        if self._environment.is_main:
            storage.write(str(path / STATE), _as_json(state).encode())
            files |= _checksums(path, [STATE, ".metadata"])
            storage.write(str(path / COMMITTED), json.dumps({"step": step, "files": files}, indent=1).encode())
        self._prune()
        barrier()
        self._refuse_unshared(path)
        self._whole = step
        self.longest = max(self.longest, time.monotonic() - started)
        self._tell_of_grace(before)
        return path

    def _tell_of_grace(self, before: float) -> None:
        if before + self.longest <= self._grace:
            return
        steps = f" and the steps before it {before:.0f} s" if before >= 1 else ""
        warn(
            self._environment,
            f"saving takes {self.longest:.0f} s{steps}, and an interruption leaves {self._grace:g} (run.grace): what "
            "came after the last checkpoint may be lost; save more often, or let more ranks share it "
            "(parallel.dp_shard)",
        )
        self._grace = math.inf  # told once

    def load(self, path: Path, engine: Engine) -> dict[str, Any]:
        """Give the engine its tensors and return the rest of the state; collective. Raises :class:`UserError`."""
        if path != self._checked:
            self.refuse_damaged(path)
        state = engine.state_dict()
        self._match(path, state)
        load_tensors(path, state)
        engine.load_state_dict(state)
        return read_state(path)

    def _match(self, path: Path, state: dict[str, Any]) -> None:
        """Leave out of ``state`` what the checkpoint may lack, and tell what is in one of the two alone."""
        saved = parts_saved(path)
        for part, (missing, unwanted) in OPTIONAL.items():
            if part in saved and part not in state:
                say(self._environment, f"{path.name} {unwanted}")
            if part in state and part not in saved:
                del state[part]
                say(self._environment, f"{path.name} {missing}")

    def resume_from(self, path: Path, engine: Engine) -> None:
        """Load, and go on from there: later checkpoints, damaged ones among them, are dropped; collective."""
        best = self.load(path, engine).get("best")
        self._whole = int(json.loads((path / COMMITTED).read_text())["step"])
        whole = set(from_main([each.name for each in committed(self.folder)]))
        if self._tidies:
            for other in self.folder.glob("step-*"):
                if other.name > path.name or other.name not in whole:  # torn saves among them
                    self._drop(other)
        if best is not None:
            self.mark_best(**best)  # the run may have ended between the save and the mark
        barrier()

    def latest(self) -> Path | None:
        """The last committed checkpoint whose files are whole; collective. Damaged ones are passed over, aloud."""
        for name in from_main([path.name for path in committed(self.folder)[::-1]]):
            path = self.folder / name
            damage = [found for found in gathered(self._damage(path)) if found]
            if not damage:
                self._checked = path
                return path
            warn(self._environment, f"passing over {path}: {damage[0]}")
        return None

    def begin_anew(self) -> None:
        """Set aside what there is, of which nothing is whole: by its later steps it would push out what is saved now.
        It stays as ``damaged-<time>-step-...``, for it may be mended, or a disk may only have been slow."""
        if self._tidies:
            now = time.strftime("%Y%m%d-%H%M%S")
            for path in self.folder.glob("step-*"):
                path.rename(self.folder / f"damaged-{now}-{path.name}")
        barrier()

    def refuse_damaged(self, path: Path) -> None:
        """Check sizes and checksums of its files, each on one rank; collective. Raises :class:`UserError`."""
        damage = [found for found in gathered(self._damage(path)) if found]
        if damage:
            raise UserError(f"the checkpoint {path} is damaged: {damage[0]}; take another one")

    def best(self) -> Path | None:
        """The checkpoint marked best, as rank 0 sees it; collective."""
        found = best_checkpoint(self.folder)
        name = from_main(None if found is None else found.name)
        return None if name is None else self.folder / str(name)

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Keep the checkpoint of ``step`` as the best until another is marked; by all ranks."""
        if self._environment.is_main:
            record = {"step": step, "metric": metric, "value": value}
            storage.write(str(self.folder / BEST), json.dumps(record).encode())
        self._prune()

    def _prune(self) -> None:
        """What rank 0 sees is too old goes, on each host that has a part of it."""
        old: list[str] = []
        if self._environment.is_main:
            best = best_checkpoint(self.folder)
            kept = {best, step_folder(self.folder, self._saved)}
            old = [path.name for path in committed(self.folder)[: -self._keep] if path not in kept]
        if not self._shared:
            old = from_main(old)
        if self._tidies:
            for name in old:
                self._drop(self.folder / name)

    @staticmethod
    def _drop(path: Path) -> None:
        (path / COMMITTED).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=not path.exists())

    def _refuse_unshared(self, path: Path) -> None:
        """Ranks that do not see what rank 0 has written could never load it."""
        if self._seen_by_all:
            return
        blind = [rank for rank, sees in enumerate(gathered((path / COMMITTED).is_file())) if not sees]
        if blind:
            raise UserError(f"rank {blind[0]} does not see {path}: run.folder must lie on a disk that all hosts share")
        self._seen_by_all = True

    def _damage(self, path: Path) -> str:
        """What is wrong with this rank's share of the files that its host has; empty when nothing is."""
        here = self._environment
        rank, ranks = (here.rank, here.world_size) if self._shared else (here.local_rank, here.local_world_size)
        try:
            files = json.loads((path / COMMITTED).read_text())["files"]
            for place, (name, expected) in enumerate(sorted(files.items())):
                if place % ranks != rank:
                    continue
                found = _checksums(path, [name])[name]
                if found != expected:
                    return f"{name} has {found['bytes']} bytes and crc32c {found['crc32c']}, not {expected}"
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"it cannot be read ({error})"
        return ""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def read_state(path: Path) -> dict[str, Any]:
    """Everything but tensors of a committed checkpoint."""
    return dict(json.loads((path / STATE).read_text()))


def _as_json(state: dict[str, Any]) -> str:
    try:
        return json.dumps(state, indent=1)
    except TypeError:
        for name, value in state["hooks"].items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise UserError(f"state_dict() of hook {name} must be JSON: {error}") from None
        raise


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints by step."""
    return sorted(path.parent for path in folder.glob(f"step-*/{COMMITTED}"))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint marked best, if there is one."""
    record = folder / BEST
    if not record.is_file():
        return None
    path = step_folder(folder, json.loads(record.read_text())["step"])
    return path if (path / COMMITTED).is_file() else None


def _checksums(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    entries = {}
    for name in names:
        checksum = google_crc32c.Checksum()
        with (folder / name).open("rb") as file:
            while chunk := file.read(8 << 20):
                checksum.update(chunk)
        entries[name] = {"bytes": (folder / name).stat().st_size, "crc32c": int(checksum.hexdigest(), 16)}
    return entries
