"""Activation checkpointing (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): activations that the
backward pass needs are computed again rather than kept.

`full` keeps what enters a unit of the plan and computes the unit anew. `selective` keeps what is dear inside each unit
and computes what is cheap anew (``selective.py``). `budget` leaves to the compiler what to keep, within a share of what
it would keep by itself.

A unit's ``forward`` is wrapped, not the unit, so that parameters keep their names. Random state is that of the forward
pass, so dropout is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.parallel.selective import selectively, selectively_compiled

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes what surrounds a forward pass and its repetition."""


def checkpoint_units(units: Sequence[nn.Module], config: Config, elsewhere: bool = False) -> None:
    """Have each of ``units`` compute its activations again, in place; units inside others go with those.

    A stage of a pipeline may have none where others have some, ``elsewhere``.

    Raises :class:`UserError` for a plan without units, and for a budget over units with dropout.
    """
    kind = config.parallel.activation_checkpointing
    if kind == "budget":
        _refuse_dropout(units)
    if config.precision.compile:
        from torch._functorch import config as functorch  # slow to import

        functorch.activation_memory_budget = config.parallel.activation_budget if kind == "budget" else 1.0
    if kind not in ("full", "selective"):
        return
    if not units and not elsewhere:
        raise UserError(
            f"parallel.activation_checkpointing {kind} computes units of the plan again, and the plan has none; name "
            "them in Plan(units=(...))"
        )
    compute_again(units, kind, config.precision.compile)


def compute_again(units: Sequence[nn.Module], kind: str, compiled: bool = False) -> None:
    """``full`` or ``selective`` checkpointing of each of ``units`` that is not inside of another, in place."""
    inside = {child for unit in units for child in unit.modules() if child is not unit}
    for unit in units:
        if unit not in inside:
            unit.forward = _wrapped(unit, kind, compiled)


def _wrapped(unit: nn.Module, kind: str, compiled: bool) -> Any:
    # the compiler writes buffers once by itself, and takes no contexts but torch's own
    if not compiled and any(True for _ in unit.buffers()):
        plain: Contexts = selectively if kind == "selective" else noop_context_fn
        return partial(_within, partial(_buffers_once, unit, plain), unit.forward)
    if kind == "full":
        return partial(_full, unit.forward)
    return partial(_within, selectively_compiled if compiled else selectively, unit.forward)


def _full(forward: Any, *values: Any, **named: Any) -> Any:
    return checkpoint(forward, *values, use_reentrant=False, **named)


def _within(contexts: Contexts, forward: Any, *values: Any, **named: Any) -> Any:
    return checkpoint(forward, *values, use_reentrant=False, context_fn=contexts, **named)


def _buffers_once(unit: nn.Module, plain: Contexts) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    first, again = plain()
    return first, _put_back(list(unit.buffers()), again)


@contextmanager
def _put_back(buffers: Sequence[Tensor], again: AbstractContextManager[Any]) -> Iterator[None]:
    """The repetition leaves running statistics as the forward pass has left them."""
    before = [buffer.clone() for buffer in buffers]
    try:
        with again:
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _refuse_dropout(units: Sequence[nn.Module]) -> None:
    """torch's compiler draws random numbers of what it computes again anew: with dropout gradients are wrong (2.13)."""
    for unit in units:
        for module in unit.modules():
            chance = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
            if chance and module.p:
                raise UserError(
                    f"parallel.activation_checkpointing budget and the {type(module).__name__} of probability "
                    f"{module.p} in {type(unit).__name__} do not go together: torch draws it anew in the backward "
                    "pass; take selective, or set dropout to 0"
                )
