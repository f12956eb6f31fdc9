"""Tensors to start from: a file of safetensors or torch, here or on S3, or a checkpoint of one of our runs.

A file is mapped into memory, and only what the model asks for is read. A remote one is fetched once per host. Pickles
are read by torch's unpickler for tensors alone, so a file from somewhere else runs no code.

    weights = starting_weights(config, environment)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dltrain import storage
from dltrain.checkpoint.checkpointer import COMMITTED, Checkpointer
from dltrain.checkpoint.tensors import CheckpointTensors
from dltrain.config import Config, Model
from dltrain.errors import UserError
from dltrain.parallel.weights import Tensors, Weights
from dltrain.run_folder import RECORD, RunFolder
from dltrain.runtime.environment import Environment

_INSIDE = ("state_dict", "model_state_dict", "model", "module")
"""Under which of these a file that holds more than a model has the model's tensors."""


def wants_weights(config: Config) -> bool:
    """Whether a run of this config begins with weights trained before."""
    return isinstance(config.model, Model) and bool(config.model.weights)


def starting_weights(config: Config, environment: Environment) -> Weights | None:
    """What ``model.weights`` names, if anything; collective for a checkpoint. Raises :class:`UserError`."""
    if not wants_weights(config):
        return None
    return Weights(open_tensors(config.model.weights, environment), config.model.weights_skip)


def open_tensors(url: str, environment: Environment) -> Tensors:
    """The tensors of a file, of a checkpoint's folder, or of a run's best (or last) checkpoint."""
    folder = Path(url.removeprefix("file://")).expanduser()
    if folder.is_dir():
        return CheckpointTensors(_checkpoint_in(folder, environment))
    kind = Path(url).suffix
    if kind not in (".safetensors", ".pt", ".pth", ".bin"):
        raise UserError(
            f"model.weights is {url!r}, which is neither a .safetensors, .pt, .pth or .bin file nor the folder of a "
            "run or of a checkpoint"
        )
    path = on_this_host(url)
    return SafetensorsFile(path, url) if kind == ".safetensors" else TorchFile(path, url)


class SafetensorsFile:
    """A file of safetensors, mapped."""

    def __init__(self, path: Path, origin: str) -> None:
        self.origin = origin
        try:
            self._file = file = cast(Any, safe_open(path, framework="pt"))
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        except (SafetensorError, OSError) as error:
            raise _unreadable(origin, "safetensors", error) from None

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class TorchFile:
    """A ``state_dict`` by ``torch.save``, alone or inside a dict of other things; mapped, unless torch's old format."""

    def __init__(self, path: Path, origin: str) -> None:
        self.origin = origin
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{origin} is no torch file of tensors alone ({_first_line(error)}); save model.state_dict() by itself"
            ) from None
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise _unreadable(origin, "torch", error) from None
        self._tensors = _state_dict(saved, origin)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def on_this_host(url: str) -> Path:
    """The file itself where it is local; otherwise a copy that the host's ranks share, kept for later runs.

    One rank fetches it, under a kernel lock, while the others wait. The copy's name has the object's tag.
    """
    info = storage.stat(url)
    local = storage.local_path(url)
    if local is not None:
        return local
    folder = _copies()
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{url} {info.etag} {info.size}".encode()).hexdigest()[:16]
    copy = folder / f"{digest}-{Path(url).name}"
    with (folder / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_file():
            _fetch(url, copy)
    return copy


def _fetch(url: str, copy: Path) -> None:
    part = copy.with_name(f"{copy.name}.part")
    try:
        with storage.open_object(url) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 32 << 20)
        part.replace(copy)
    except OSError as error:
        raise UserError(f"cannot keep a copy of {url} in {copy.parent}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _copies() -> Path:
    """Below ``$DLTRAIN_CACHE``, or the temporary folder: on a disk of this host."""
    base = os.environ.get("DLTRAIN_CACHE")
    return (Path(base).expanduser() if base else Path(tempfile.gettempdir()) / f"dltrain-{os.getuid()}") / "weights"


def _checkpoint_in(folder: Path, environment: Environment) -> Path:
    """The folder of a checkpoint, its files checked: itself, or a run's best or last; collective."""
    if (folder / COMMITTED).is_file():
        Checkpointer(folder.parent, 1, environment).refuse_damaged(folder)
        return folder
    if not (folder / RECORD).is_file():
        raise UserError(f"model.weights is {folder}, which is the folder of neither a run nor a committed checkpoint")
    checkpointer = Checkpointer(RunFolder(folder).checkpoints, 1, environment)
    best = checkpointer.best()
    if best is not None:
        checkpointer.refuse_damaged(best)
        return best
    latest = checkpointer.latest()
    if latest is None:
        raise UserError(f"model.weights is the run {folder}, which has no checkpoint")
    return latest


def _state_dict(saved: Any, origin: str) -> dict[str, Tensor]:
    for key in _INSIDE:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    entries = saved.items() if isinstance(saved, Mapping) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{origin} has no tensors by name; save model.state_dict() with torch.save")
    return tensors


def _unreadable(origin: str, kind: str, error: Exception) -> UserError:
    return UserError(f"{origin} cannot be read as a {kind} file: {_first_line(error)}; fetch or save it anew")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
