"""Into how many ranks each axis of a layout is cut: resolved, checked, and, where they do not fit, what would.

Arithmetic of integers, without torch: a launcher refuses with it before any rank starts.

    degrees_of(config.parallel, Environment(0, 4, 0, 4))  # Degrees(pp=1, dp_replicate=4, dp_shard=1, cp=1, tp=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment


class Degrees(NamedTuple):
    """Of the axes, outermost first."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def reduced_ranks(self) -> int:
        """Ranks over which gradients are averaged: those with other samples, or other tokens of the same ones."""
        return self.data_ranks * self.cp

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the parameters: in shards, or, where DDP cannot, as replicas in shards of one."""
        return self.dp_shard > 1 or (self.reduced_ranks > 1 and self.tp * self.pp > 1)


def degrees_of(parallel: Parallel, environment: Environment) -> Degrees:
    """Resolve -1. Raises :class:`UserError` where degrees do not multiply to the number of ranks, or split layers would
    reach over nodes; it names the nearest layouts that this world has."""
    world, tp, cp, pp = environment.world_size, parallel.tp, parallel.cp, parallel.pp
    model = pp * cp * tp

    def near() -> str:
        return f"; for {world} ranks there are {nearest_legal(parallel, environment)}"

    if environment.local_world_size % tp:
        raise UserError(
            f"parallel.tp is {tp}, which does not divide the {_ranks(environment.local_world_size)} of a node; ranks "
            f"that share layers must be on one node{near()}"
        )
    if world % model:
        raise UserError(f"{_product({'pp': pp, 'cp': cp, 'tp': tp})} does not divide the {world} ranks{near()}")
    replicate, shard = _resolved(parallel, world // model, world, near)
    degrees = Degrees(pp, replicate, shard, cp, tp)
    if math.prod(degrees) != world:
        raise UserError(
            f"{_product(degrees._asdict())}, but there are {world} ranks; give dp_replicate or dp_shard -1, or start "
            f"{math.prod(degrees)} ranks{near()}"
        )
    return degrees


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _product(degrees: dict[str, int]) -> str:
    """Degrees multiplied, without those that are 1 and need not be said."""
    said = [f"parallel.{name} {degree}" for name, degree in degrees.items() if degree > 1 or name not in ("pp", "cp")]
    return f"{' x '.join(said)} = {math.prod(degrees.values())}"


def nearest_legal(
    parallel: Parallel, environment: Environment, fits: Callable[[Degrees], bool] = lambda _: True
) -> str:
    """Up to three layouts that this world has and that ``fit``, as the options that make them of ``parallel``, those
    that change the least first."""
    found = sorted(filter(fits, _legal(environment)), key=lambda degrees: _distance(parallel, degrees))
    return ", or ".join(_options(parallel, degrees) for degrees in found[:3]) or "none"


def _options(parallel: Parallel, degrees: Degrees) -> str:
    changed = {name: value for name, value in degrees._asdict().items() if getattr(parallel, name) != value}
    shards = changed.get("dp_shard", parallel.dp_shard)
    if parallel.dp_replicate == -1 and shards != -1:
        changed.pop("dp_replicate", None)  # takes the ranks that are left
    return " ".join(f"--parallel.{name} {value}" for name, value in changed.items())


def _legal(environment: Environment) -> Iterator[Degrees]:
    world = environment.world_size
    for tp in _divisors(environment.local_world_size):
        for pp in _divisors(world // tp):
            for cp in _divisors(world // tp // pp):
                left = world // tp // pp // cp
                yield from (Degrees(pp, left // shard, shard, cp, tp) for shard in _divisors(left))


def _distance(parallel: Parallel, degrees: Degrees) -> tuple[float, Degrees]:
    """By how many halvings and doublings of the degrees asked for they are apart; -1 asks for nothing."""
    wanted = (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)
    pairs = zip(wanted, degrees, strict=True)
    return sum(abs(math.log2(asked / given)) for asked, given in pairs if asked > 0), degrees


def _resolved(parallel: Parallel, ranks: int, world: int, near: Callable[[], str]) -> tuple[int, int]:
    replicate, shard = parallel.dp_replicate, parallel.dp_shard
    left = "" if ranks == world else " that parallel.pp, cp and tp leave"
    for name, degree in (("dp_replicate", replicate), ("dp_shard", shard)):
        if degree == 0 or (degree > 0 and ranks % degree):
            raise UserError(f"parallel.{name} is {degree}, which does not divide the {ranks} ranks{left}{near()}")
    if replicate == shard == -1:
        return 1, ranks
    if replicate == -1:
        return ranks // shard, shard
    if shard == -1:
        return replicate, ranks // replicate
    return replicate, shard


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
