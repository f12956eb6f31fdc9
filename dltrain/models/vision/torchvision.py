"""Models of torchvision, by name, with random weights unless told otherwise. The names are torchvision's own.

model = torchvision_model("vit_b_16", image_size=64)
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dltrain.errors import UserError, nearest

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_definitions: list[torch.library.Library] = []  # torch forgets the operators of a library that is collected


def torchvision_model(name: str, **settings: Any) -> nn.Module:
    """The model torchvision calls ``name``; ``settings`` are its builder's, such as ``num_classes`` and ``weights``.

    Raises :class:`UserError` when torchvision is missing, does not fit this torch, or has no such model.
    """
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise UserError(f"torchvision has no model {name!r}; {nearest(name, known)}")
    model: nn.Module = models.get_model(name, **settings)
    return model


def import_torchvision() -> ModuleType:
    """The package ``torchvision``, imported; raises :class:`UserError` when it is missing or does not fit this torch.

    PyPI's wheel is built for CUDA. Beside a CPU build of torch its C extension does not load, so that nobody defines
    ``torchvision::nms`` and ``qnms``; its Python part describes the two all the same, and fails. Models for
    classification never call them: a definition without a kernel is enough. Where the extension loads, the first
    import succeeds and nothing is defined here, for defining an operator twice is an error of its own.
    """
    try:
        return import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise UserError("torchvision is not installed; install it with: pip install 'dltrain[bench]'") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _forget_torchvision()
    _define_operators()
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        raise UserError(
            f"torchvision does not fit torch {torch.__version__} ({error}); install the release made for it"
        ) from error


def _forget_torchvision() -> None:
    """A failed import leaves the submodules it had finished behind; the next one starts afresh."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _define_operators() -> None:
    if not _definitions:
        # FRAGMENT stands beside a definition of the same namespace by somebody else; a second DEF is refused
        _definitions.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                _definitions[0].define(schema)  # type: ignore[no-untyped-call]
