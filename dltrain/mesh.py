"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``pp, dp_replicate, dp_shard, cp, tp``, outermost first, so that the ranks that split layers, which talk most,
are neighbours, and the parts of a pipeline, which talk least, lie furthest apart. Degrees are checked once, here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment

_AXES = ("pp", "dp_replicate", "shard", "tp")  # ranks with other tokens of the same samples have shards of their own


@dataclass(frozen=True)
class Mesh:
    """Degrees of every axis and, with more than one rank, torch's mesh of them, in which dp_shard and cp are one."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    environment: Environment
    devices: DeviceMesh | None
    context: dist.ProcessGroup | None
    """The ranks that share the tokens of the same samples."""

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """This rank's group among them, counted across nodes first, so that a node reads its own lanes alone.

        Each part of a pipeline counts for itself: the nodes it fills, or its ranks of one node.
        """
        here, part = self.environment, self._part
        alike = self.cp * self.tp
        if part % here.local_world_size or here.local_world_size % alike:
            return here.rank % part // alike
        nodes = part // here.local_world_size
        return here.local_rank // alike * nodes + here.node % nodes

    @property
    def pp_rank(self) -> int:
        """This rank's part of the pipeline."""
        return self.environment.rank // self._part

    @property
    def random_stream(self) -> int:
        """A number that ranks share which must draw the same random numbers: those that share layers."""
        context = self.environment.rank // self.tp % self.cp
        return (self.pp_rank * self.cp + context) * self.data_ranks + self.data_rank

    @property
    def first_of_part(self) -> bool:
        """Whether this is the first rank of its part of the pipeline."""
        return self.environment.rank % self._part == 0

    @property
    def counts(self) -> bool:
        """Whether this rank stands for those that see the same samples in the same part of the pipeline."""
        return self.environment.rank % (self.cp * self.tp) == 0

    @property
    def reduced_ranks(self) -> int:
        """Ranks over which gradients are averaged: those with other samples, or other tokens of the same ones."""
        return self.data_ranks * self.cp

    @property
    def _part(self) -> int:
        """Ranks of one part of the pipeline, which follow one another."""
        return self.environment.world_size // self.pp

    def shard_axes(self) -> DeviceMesh:
        """The mesh FSDP2 works on: one axis of shards, or replicas of shards (HSDP).

        Ranks with other tokens of the same samples have shards of their own.
        """
        return self._axes("dp_replicate", "shard") if self.dp_replicate > 1 else self._axes("shard")

    def tensor_axis(self) -> DeviceMesh:
        """The ranks that share layers."""
        return self._axes("tp")

    def pipeline_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the parts of one pipeline; ``None`` without one."""
        return self._axes("pp").get_group() if self.pp > 1 else None

    @cached_property
    def _stage_group(self) -> dist.ProcessGroup | None:
        if self.environment.world_size == 1 or self.devices is None:
            return None
        if self.pp == 1:
            return dist.group.WORLD
        if self._part == 1:
            return None
        return self._axes("dp_replicate", "shard", "tp")._flatten("part").get_group()

    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of the model, in whole or in shards; ``None`` for one alone."""
        return self._stage_group

    def _axes(self, *names: str) -> DeviceMesh:
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes")
        return self.devices[names]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """Resolve -1, check that the degrees multiply to the number of ranks, and build. Raises :class:`UserError`."""
    world, tp, cp, pp = environment.world_size, parallel.tp, parallel.cp, parallel.pp
    replicate, shard = data_degrees(parallel, environment)
    devices = context = None
    if world > 1:
        devices = init_device_mesh(device.type, (pp, replicate, shard * cp, tp), mesh_dim_names=_AXES)
    if cp > 1:
        apart = init_device_mesh(device.type, (world // (cp * tp), cp, tp), mesh_dim_names=("rest", "cp", "tp"))
        context = apart["cp"].get_group()
    return Mesh(pp, replicate, shard, cp, tp, environment, devices, context)


def data_degrees(parallel: Parallel, environment: Environment) -> tuple[int, int]:
    """dp_replicate and dp_shard with -1 resolved. Raises :class:`UserError` for degrees that do not make the world."""
    world, tp, cp, pp = environment.world_size, parallel.tp, parallel.cp, parallel.pp
    model = pp * cp * tp
    if environment.local_world_size % tp:
        raise UserError(
            f"parallel.tp is {tp}, which does not divide the {environment.local_world_size} ranks of a node; ranks "
            "that share layers must be on one node"
        )
    if world % model:
        raise UserError(
            f"parallel.pp {pp} x parallel.cp {cp} x parallel.tp {tp} = {model} does not divide the {world} ranks"
        )
    replicate, shard = _resolve(parallel.dp_replicate, parallel.dp_shard, world // model)
    total = replicate * shard * model
    if total != world:
        degrees = {"pp": pp, "dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp}
        shown = [f"parallel.{name} {degree}" for name, degree in degrees.items() if degree > 1 or "dp" in name]
        raise UserError(
            f"{' x '.join(shown)} = {total}, but there are {world} ranks; give dp_replicate or dp_shard -1, or start "
            f"{total} ranks"
        )
    return replicate, shard


def _resolve(replicate: int, shard: int, ranks: int) -> tuple[int, int]:
    for name, degree in (("dp_replicate", replicate), ("dp_shard", shard)):
        if degree == 0 or (degree > 0 and ranks % degree):
            raise UserError(f"parallel.{name} is {degree}, which does not divide the {ranks} ranks")
    if replicate == shard == -1:
        return 1, ranks
    if replicate == -1:
        return ranks // shard, shard
    if shard == -1:
        return replicate, ranks // replicate
    return replicate, shard
