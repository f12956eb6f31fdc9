"""Parameters that are not trained: they get no gradient, no decay and no optimizer state, and do not count in norms.

Buffers are no parameters: running statistics of a batch norm whose weights are frozen go on following the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from dltrain.errors import UserError


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Switch off the gradients of parameters whose names match, by any name of theirs.

    Raises :class:`UserError` for a pattern that matches nothing, and when nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [parameter for name, parameter in named if fnmatchcase(name, pattern)]
        if not matched:
            some = f", such as {named[0][0]!r}" if named else ""
            raise UserError(f"optim.frozen has {pattern!r}, which matches no parameter{some}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if named and not any(parameter.requires_grad for _, parameter in named):
        raise UserError("the model has no parameter to train: all are frozen; give optim.frozen fewer patterns")
