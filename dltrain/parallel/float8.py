"""Linear layers that multiply in float8, for Hopper and newer (Micikevicius et al., "FP8 Formats for Deep Learning",
2022), by torchao: weights stay as they are, and each product is scaled by the largest number of its operands.

On a CPU the rounding is emulated, so that a recipe runs there too and its layouts can be compared; it is no faster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from dltrain.errors import UserError

_MULTIPLE = 16
"""Of inputs and outputs, which the kernels of float8 want."""

_HOPPER = (9, 0)


def multiply_in_float8(units: Iterable[nn.Module], device: torch.device) -> None:
    """Replace the linear layers inside of each unit, in place; those whose sizes are no multiples of 16 are left.

    Raises :class:`UserError` where torchao is missing, the GPU is too old, or no layer fits.
    """
    _refuse(device)
    with _quiet():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # slow to import, and optional

    config = Float8LinearConfig(emulate=device.type == "cpu")
    replaced = False
    for unit in units:
        if any(_fits(child, name) for name, child in unit.named_modules() if name):
            convert_to_float8_training(unit, module_filter_fn=_fits, config=config)
            replaced = True
    if not replaced:
        raise UserError(
            f"precision.float8 is true, and no linear layer inside of the plan's units has inputs and outputs in "
            f"multiples of {_MULTIPLE}; set precision.float8 false"
        )


def _refuse(device: torch.device) -> None:
    if find_spec("torchao") is None:
        raise UserError("precision.float8 is true and torchao is not installed; pip install 'dltrain[float8]'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _HOPPER:
        raise UserError(
            f"precision.float8 is true, and {torch.cuda.get_device_name(device)} has no products of float8; take an "
            "H100 or newer, or set precision.float8 false"
        )


def _fits(module: nn.Module, name: str) -> bool:
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
    return not any(size % _MULTIPLE for size in sizes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of extensions that this machine cannot load and does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
