"""What the compiler is given, and the first passes, in which it works."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compile the forward of each module, in place, when it is first called."""
    for module in modules:
        # the compiler passes over functions of torch's own, such as the forward of a Sequential, unless another's calls
        module.forward = partial(_called, module.forward)
        module.compile()


def _called(forward: Any, *values: Any, **named: Any) -> Any:
    return forward(*values, **named)
