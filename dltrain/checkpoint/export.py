"""A trained model for others to use: whole weights in one file, and what one must know to use them.

    export_model(folder, engine, facts, config_yaml, recipe)  # collective; rank 0 writes

``model.safetensors`` holds parameters and buffers by the names of the recipe's model (what ``model.weights`` takes),
averaged ones where an average was kept; ``config.yaml`` and ``recipe.py`` make the model and prepare its inputs;
``model.json`` says what came in and out: classes, scores, step, versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from dltrain import storage
from dltrain.parallel.engine import Engine
from dltrain.parallel.gradients import whole
from dltrain.parallel.pieces import AXES

WEIGHTS, FACTS = "model.safetensors", "model.json"


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model on the host, on rank 0, and nothing on the others; collective."""
    mesh = engine.mesh
    # one rank of each stage of a pipeline
    first = not any(mesh.place_on(axis) for axis in AXES if mesh.axis_group(axis) is not None)
    mine: dict[str, Tensor] = {}
    for piece in engine.pieces("weights"):
        tensor = whole(piece.tensor)
        if first:
            mine[piece.name] = tensor.detach().cpu().contiguous()
    if first:
        mine |= {name: whole(value).detach().cpu().contiguous() for name, value in engine.named_buffers()}
    return _gathered(mine, mesh.pp)


def _gathered(mine: dict[str, Tensor], stages: int) -> dict[str, Tensor]:
    if not dist.is_initialized() or stages == 1:
        return mine
    everyone: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(mine, everyone or None)
    return {name: tensor for some in everyone for name, tensor in some.items()}


def export_model(folder: Path, engine: Engine, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write the weights, ``facts`` as ``model.json``, and ``files`` by name; collective, and rank 0 alone writes."""
    part = folder / f".{WEIGHTS}"
    if engine.mesh.environment.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    with engine.averaged(), torch.no_grad():  # what is on the host already is the model's own memory
        weights = whole_weights(engine)
        if engine.mesh.environment.is_main:
            save_file(_unshared(weights), part, {"format": "pt"})
    if not engine.mesh.environment.is_main:
        return
    part.rename(folder / WEIGHTS)
    for name, data in files.items():
        storage.write(str(folder / name), data)
    storage.write(str(folder / FACTS), (json.dumps(facts, indent=1) + "\n").encode())


def _unshared(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what lies in the same memory, as tied weights do, which the format cannot say."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
