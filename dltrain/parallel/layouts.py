"""The layouts there are for so many ranks: the world as a product of degrees, and what goes with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.mesh import data_degrees
from dltrain.runtime.environment import Environment

SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv_zero_bubble")
"""Those tried for a pipeline, unless one is given."""

_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "pp")


def layouts(parallel: Parallel, given: Collection[str], world: int, node_ranks: int) -> Iterator[Parallel]:
    """Every layout that the mesh accepts; settings of ``parallel`` whose names are ``given`` stay as they are.

    What a model refuses, its plan does not say, is not known here.
    """
    environment = Environment(0, world, 0, min(world, node_ranks))
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    fixed = {name for name in _DEGREES if name in given and getattr(parallel, name) != -1}
    choices = [[getattr(parallel, name)] if name in fixed else divisors for name in _DEGREES]
    for degrees in product(*choices):
        wanted = dict(zip(_DEGREES, degrees, strict=True))
        if not _legal(parallel.replace(**wanted), environment):
            continue
        for settings in _settings(wanted, parallel, given):
            yield parallel.replace(**wanted, **settings)


def _legal(parallel: Parallel, environment: Environment) -> bool:
    try:
        data_degrees(parallel, environment)
    except UserError:
        return False
    return True


def _settings(degrees: dict[str, int], parallel: Parallel, given: Collection[str]) -> Iterator[dict[str, Any]]:
    """What may be chosen under these degrees."""
    open_choices: dict[str, tuple[Any, ...]] = {
        "schedule": SCHEDULES if degrees["pp"] > 1 else (parallel.schedule,),
        "sequence": (False, True) if degrees["tp"] > 1 else (False,),
        "reshard_after_forward": (True, False) if degrees["dp_shard"] > 1 and degrees["pp"] == 1 else (True,),
    }
    choices = {name: (getattr(parallel, name),) if name in given else some for name, some in open_choices.items()}
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))
