"""What a run has statistics of, and those of one tensor: ``dltrain debug show RUN --names`` and ``--tensor NAME``."""

from __future__ import annotations

import re

import numpy as np

from dltrain.debugger.run import open_run
from dltrain.debugger.seen import kind_of
from dltrain.debugger.show import terminal
from dltrain.debugger.smdebug.run import ImportedRun, ImportedTensor
from dltrain.errors import UserError

_ROWS = 200
"""Steps in a tensor's table; of more, some are shown, evenly apart."""

_REDUCTIONS = ("mean", "std", "min", "max", "abs_mean", "l2", "fraction_zero", "fraction_nonfinite")


def show_names(url: str, regex: str) -> int:
    """Print the names of tensors that there are statistics of, by kind; those that the expression is found in."""
    run = open_run(url)
    try:
        names = run.tensor_names(regex=regex)
    except re.error as error:
        raise UserError(f"--names {regex!r} is no regular expression: {error}") from None
    if not names:
        raise UserError(f"{url} has no tensor whose name has {regex!r} in it; --names alone lists all")
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = run.kind_of(name) if isinstance(run, ImportedRun) else kind_of(name)
        kinds.setdefault(kind, []).append(name)
    for kind, some in kinds.items():
        print(f"{kind} ({len(some)})")
        print("".join(f"  {name}\n" for name in some), end="")
    return 0


def show_tensor(url: str, name: str) -> int:
    """Print what is known of a tensor at each of its steps."""
    from rich.table import Table  # slow to import

    tensor = open_run(url).tensor(name)
    shown = [each for each in _REDUCTIONS if not isinstance(tensor, ImportedTensor) or tensor.can(each)]
    if not tensor.steps or not shown:
        raise UserError(f"{name} has no statistics")
    places = np.unique(np.linspace(0, len(tensor.steps) - 1, _ROWS).astype(int))
    columns = [tensor.reductions(each)[places] for each in shown]
    left_out = len(tensor.steps) - len(places)
    title = name + (f" ({left_out} steps between these are left out)" if left_out else "")
    table = Table("step", *(each.replace("_", " ") for each in shown), title=title)
    for step, *values in zip(np.array(tensor.steps)[places], *columns, strict=True):
        table.add_row(str(step), *(f"{value:.3g}" for value in values))
    terminal().print(table)
    return 0
