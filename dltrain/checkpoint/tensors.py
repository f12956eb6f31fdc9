"""Tensors of model and optimizer by torch's distributed checkpoint (DCP), and nothing else.

DCP unpickles what is not a tensor, and its own ``.metadata``, without limits. So only tensors are given to it, and the
metadata is read by an unpickler that knows DCP's classes and no others: a checkpoint from somewhere else runs no code.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dltrain.errors import UserError

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}
# by name, for that module also holds `dataclass` and `os`, with which a pickle can run code
_ALLOWED_METADATA = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}
_ALLOWED_FILESYSTEM = {"_StorageInfo", "_StoragePrefix"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _ALLOWED
        known |= module == "torch.distributed.checkpoint.metadata" and name in _ALLOWED_METADATA
        known |= module == "torch.distributed.checkpoint.filesystem" and name in _ALLOWED_FILESYSTEM
        known |= module == "torch" and name in _dtype_names()
        if not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with (Path(self.path) / ".metadata").open("rb") as file:
                self._metadata = _Unpickler(file).load()
        metadata = self._metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Write the tensors of an engine's state; collective."""
    with _quiet():
        save(flatten(state), storage_writer=FileSystemWriter(folder), no_dist=not dist.is_initialized())


def load_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of an engine's state in place, whatever layout they were saved under; collective.

    Raises :class:`UserError` naming the first tensor that is missing or of another shape.
    """
    tensors, reader = flatten(state), _Reader(folder)
    saved = _names(reader)
    for name in _never_stepped(tensors, saved):
        tensors.pop(name).zero_()
    for name, tensor in tensors.items():
        there = saved.get(name)
        if not isinstance(there, TensorStorageMetadata):
            raise UserError(f"the checkpoint {folder} has no tensor {name!r}: it is of another model or optimizer")
        if there.size != tensor.shape:
            raise UserError(
                f"tensor {name!r} has shape {tuple(there.size)} in the checkpoint {folder} and {tuple(tensor.shape)} "
                "here; give the model the settings it was trained with, or start a new run"
            )
    with _quiet():
        load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def parts_saved(folder: Path) -> set[str]:
    """First words of the names of what lies there: ``model``, ``optimizer``, perhaps ``ema`` and ``loss_scale``."""
    return {name.partition("/")[0] for name in _names(_Reader(folder))}


def _names(reader: _Reader) -> Mapping[str, Any]:
    """What is saved, by name. Raises :class:`UserError` where that cannot be read."""
    try:
        return reader.read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError) as error:
        raise UserError(f"the checkpoint {reader.path} cannot be read: {error}") from None


def _never_stepped(tensors: dict[str, Tensor], saved: Mapping[str, Any]) -> list[str]:
    """Optimizer states of parameters that had none when saved, for they had had no gradient: they start from zero."""
    states = [name for name in tensors if name.startswith("optimizer/")]
    with_state = {name.rpartition("/")[0] for name in saved if name.startswith("optimizer/")}
    missing = [name for name in states if name.rpartition("/")[0] not in with_state]
    return missing if len(missing) < len(states) else []


class CheckpointTensors:
    """The model's tensors of a checkpoint, each whole and on the CPU, read one at a time by this process alone."""

    def __init__(self, folder: Path) -> None:
        self.origin = str(folder)
        self._reader = _Reader(folder)
        try:
            saved = self._reader.read_metadata().state_dict_metadata
        except (pickle.UnpicklingError, OSError, EOFError, AttributeError) as error:
            raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None
        self._entries = {
            name.removeprefix("model/"): entry
            for name, entry in saved.items()
            if name.startswith("model/") and isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with _quiet():
            load({f"model/{name}": tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole and on the CPU, by the names of :func:`flatten`; for one process alone."""
    reader = _Reader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with _quiet():
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def flatten(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name: ``model/<parameter>``, ``optimizer/<parameter>/<state>``, and ``ema/weights/<parameter>``."""
    tensors = {f"model/{name}": value for name, value in state["model"].items()}
    for name, values in state["optimizer"]["state"].items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    if "ema" in state:
        tensors |= {f"ema/weights/{name}": value for name, value in state["ema"]["weights"].items()}
        tensors["ema/updates"] = state["ema"]["updates"]
    tensors |= {f"loss_scale/{name}": value for name, value in state.get("loss_scale", {}).items()}
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remark that one process alone saves as one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _dtype_names() -> set[str]:
    return {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
