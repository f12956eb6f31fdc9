"""The layouts there are for so many ranks: the world as a product of degrees, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

from dltrain.config import Parallel

SCHEDULES = ("1f1b", "interleaved_1f1b", "zbv_zero_bubble")
"""Those tried for a pipeline, unless one is given."""

_DEGREES = ("dp_replicate", "dp_shard", "cp", "tp", "pp")


def layouts(parallel: Parallel, given: Collection[str], world: int, node_ranks: int) -> Iterator[Parallel]:
    """Every layout that the mesh accepts; settings of ``parallel`` whose names are ``given`` stay as they are.

    What a model refuses, its plan does not say, is not known here.
    """
    node = min(world, node_ranks)  # whose ranks those that split layers are among
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    fixed = {name for name in _DEGREES if name in given and getattr(parallel, name) != -1}
    choices = [[getattr(parallel, name)] if name in fixed else divisors for name in _DEGREES]
    for degrees in product(*choices):
        wanted = dict(zip(_DEGREES, degrees, strict=True))
        if math.prod(degrees) != world or node % wanted["tp"]:
            continue
        if "dp_shard" in given and parallel.dp_shard == parallel.dp_replicate == -1 and wanted["dp_replicate"] > 1:
            continue  # dp_shard takes the ranks that are left
        for settings in _settings(wanted, parallel, given):
            yield parallel.replace(**wanted, **settings)


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
