"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``pp, dp_replicate, dp_shard, tp``, outermost first, so that the ranks that split layers, which talk most, are
neighbours, and the parts of a pipeline, which talk least, lie furthest apart. Degrees are checked once, here.
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

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """Degrees of every axis and, with more than one rank, torch's mesh of them."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int
    environment: Environment
    devices: DeviceMesh | None

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
        place = here.rank % part // self.tp
        if part % here.local_world_size:
            return place
        nodes = part // here.local_world_size
        return here.local_rank // self.tp * nodes + here.node % nodes

    @property
    def pp_rank(self) -> int:
        """This rank's part of the pipeline."""
        return self.environment.rank // self._part

    @property
    def random_stream(self) -> int:
        """A number that ranks share which must draw the same random numbers: those that share layers."""
        return self.pp_rank * self.data_ranks + self.data_rank

    @property
    def first_of_part(self) -> bool:
        """Whether this is the first rank of its part of the pipeline."""
        return self.environment.rank % self._part == 0

    @property
    def counts(self) -> bool:
        """Whether this rank stands for those that see the same samples in the same part of the pipeline."""
        return self.environment.rank % self.tp == 0

    @property
    def _part(self) -> int:
        """Ranks of one part of the pipeline, which follow one another."""
        return self.environment.world_size // self.pp

    def shard_axes(self) -> DeviceMesh:
        """The mesh FSDP2 works on: one axis of shards, or replicas of shards (HSDP)."""
        return self._axes("dp_replicate", "dp_shard") if self.dp_replicate > 1 else self._axes("dp_shard")

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
        return self._axes("dp_replicate", "dp_shard", "tp")._flatten("part").get_group()

    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part of the model, in whole or in shards; ``None`` for one alone."""
        return self._stage_group

    def groups(self) -> list[dist.ProcessGroup]:
        """All groups of ranks that this one talks in; none for one rank."""
        if self.devices is None:
            return []
        found = [dist.group.WORLD, self.stage_group(), *self.devices.get_all_groups()]
        return list({id(group): group for group in found if group is not None}.values())

    def _axes(self, *names: str) -> DeviceMesh:
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes")
        return self.devices[names]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """Resolve -1, check that the degrees multiply to the number of ranks, and build. Raises :class:`UserError`."""
    world, tp, pp = environment.world_size, parallel.tp, parallel.pp
    if environment.local_world_size % tp:
        raise UserError(
            f"parallel.tp is {tp}, which does not divide the {environment.local_world_size} ranks of a node; ranks "
            "that share layers must be on one node"
        )
    if world % (pp * tp):
        raise UserError(f"parallel.pp {pp} x parallel.tp {tp} = {pp * tp} does not divide the {world} ranks")
    replicate, shard = _resolve(parallel.dp_replicate, parallel.dp_shard, world // tp // pp)
    if replicate * shard * tp * pp != world:
        pipeline = f"parallel.pp {pp} x " if pp > 1 else ""
        raise UserError(
            f"{pipeline}parallel.dp_replicate {replicate} x parallel.dp_shard {shard} x parallel.tp {tp} = "
            f"{pp * replicate * shard * tp}, but there are {world} ranks; give dp_replicate or dp_shard -1, or start "
            f"{pp * replicate * shard * tp} ranks"
        )
    devices = None
    if world > 1:
        devices = init_device_mesh(device.type, (pp, replicate, shard, tp), mesh_dim_names=AXES)
    return Mesh(pp, replicate, shard, tp, environment, devices)


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
