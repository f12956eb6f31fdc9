"""Tensors themselves on disk, as safetensors: a file for each due step and each rank that has any.

Of a parameter's tensors the first of the ranks that share it writes the whole; of what modules take in and return each
rank writes that of its own samples, with their keys. Reading puts samples of all ranks one after another.

    write_raw(folder, step=50, rank=0, tensors={"head.weight": weight}, keys=("a/1", "a/2"))
    read_raw(url, 50)  # {"head.weight": array}, keys
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load
from safetensors.torch import save
from torch import Tensor

from dltrain import storage
from dltrain.debugger.sampler import name_of
from dltrain.debugger.seen import kind_of
from dltrain.errors import UserError
from dltrain.parallel.engine import Engine
from dltrain.parallel.gradients import whole
from dltrain.parallel.pieces import AXES

_NARROW = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Numbers that numpy does not know: kept as float32."""

_SIZE = 8
"""Bytes before the header, which say how long it is."""

_FILE = re.compile(r"step-(\d+)-rank-(\d+)\.safetensors")


def wholes(engine: Engine, kind: str, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a kind, in one piece and on the host, on the rank that is to write them; collective."""
    first = not any(engine.mesh.place_on(axis) for axis in AXES if engine.mesh.axis_group(axis) is not None)
    for piece in engine.pieces(kind):
        name = name_of(kind, piece.name)
        if name in wanted:
            tensor = whole(piece.tensor).detach()
            if first:
                yield name, tensor.cpu().clone()


def write_raw(folder: Path, step: int, rank: int, tensors: Mapping[str, Tensor], keys: Sequence[str]) -> None:
    """One file; nothing where there are no tensors."""
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        wide = {name: each.float() if each.dtype in _NARROW else each for name, each in tensors.items()}
        data = save({name: each.cpu().contiguous() for name, each in wide.items()}, {"keys": json.dumps(list(keys))})
        storage.write(str(folder / f"step-{step:08d}-rank-{rank:05d}.safetensors"), data)


def steps_of(url: str) -> list[int]:
    """Steps that have files under a folder or URL."""
    return sorted({step for step, _, _ in _files(url)})


def names_of_raw(url: str) -> dict[str, list[int]]:
    """The steps at which each tensor was kept, by its name."""
    found: dict[str, list[int]] = {}
    for step, _, each in sorted(_files(url)):
        size = int.from_bytes(storage.read(each, 0, _SIZE), "little")
        for name in json.loads(storage.read(each, _SIZE, _SIZE + size)):
            if name != "__metadata__" and step not in found.setdefault(name, []):
                found[name].append(step)
    return found


def read_raw(url: str, step: int) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
    """Tensors by name at a step, and the keys of the samples that those of modules are of. Raises
    :class:`UserError` where the step has none."""
    parts: dict[str, list[np.ndarray[Any, Any]]] = {}
    keys: list[str] = []
    for found, _, each in sorted(_files(url)):
        if found == step:
            data = bytes(storage.read(each))
            keys += _keys(data)
            for name, tensor in load(data).items():
                parts.setdefault(name, []).append(tensor)
    if not parts:
        raise UserError(f"{url} has no tensors of step {step}; it has those of {steps_of(url) or 'none'}")
    wholes = {name: some[0] if _is_whole(name) else np.concatenate(some) for name, some in parts.items()}
    return wholes, list(dict.fromkeys(keys))  # every stage of a pipeline has its batch's


def _is_whole(name: str) -> bool:
    return kind_of(name) not in ("activations", "inputs")


def _keys(data: bytes) -> list[str]:
    return [str(key) for key in json.loads(_header(data)["__metadata__"]["keys"])]


def _header(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:_SIZE], "little")
    return dict(json.loads(data[_SIZE : _SIZE + size]))


def _files(url: str) -> Iterator[tuple[int, int, str]]:
    for each in storage.listing(url):
        match = _FILE.fullmatch(each.rpartition("/")[2])
        if match:
            yield int(match[1]), int(match[2]), each
