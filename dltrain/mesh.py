"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``pp, dp_replicate, dp_shard, cp, tp``, outermost first, so that the ranks that split layers, which talk most,
are neighbours, and the parts of a pipeline, which talk least, lie furthest apart. ``degrees.py`` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dltrain.config import Parallel
from dltrain.degrees import Degrees, degrees_of
from dltrain.runtime.backend import SMDDP
from dltrain.runtime.environment import Environment

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Of torch's mesh. Ranks with other tokens of the same samples have shards of their own: dp_shard and cp are one."""


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
    def degrees(self) -> Degrees:
        """Of the axes alone."""
        return Degrees(self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see different samples."""
        return self.degrees.data_ranks

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
        return self.degrees.reduced_ranks

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 holds the parameters: in shards, or, where DDP cannot, as replicas in shards of one."""
        return self.degrees.is_sharded

    @property
    def _part(self) -> int:
        """Ranks of one part of the pipeline, which follow one another."""
        return self.environment.world_size // self.pp

    def shard_axes(self) -> DeviceMesh:
        """The mesh FSDP2 works on: one axis of shards, or replicas of shards (HSDP).

        Ranks with other tokens of the same samples have shards of their own.
        """
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

    @cached_property
    def _data_group(self) -> dist.ProcessGroup | None:
        if self.data_ranks == 1:
            return None
        if self.tp * self.pp == 1:
            return dist.group.WORLD
        return self._axes("dp_replicate", "dp_shard")._flatten("data").get_group()

    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same as this one and see other samples; ``None`` for one alone."""
        return self._data_group

    def axis_group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in the axis ``name`` of :data:`AXES` alone; ``None`` where there are no
        others."""
        if self.devices is None or self._size_of(name) == 1:
            return None
        return self._axes(name).get_group()

    def place_on(self, name: str) -> int:
        """This rank's place in the axis ``name`` of :data:`AXES`."""
        return 0 if self._size_of(name) == 1 else self._axes(name).get_local_rank()

    def _size_of(self, name: str) -> int:
        return dict(zip(AXES, (self.pp, self.dp_replicate, self.dp_shard * self.cp, self.tp), strict=True))[name]

    def groups(self) -> list[dist.ProcessGroup]:
        """All groups of ranks that this one talks in; none for one rank."""
        if self.devices is None:
            return []
        found = [dist.group.WORLD, self.stage_group(), self.data_group(), self.context, *self.devices.get_all_groups()]
        return list({id(group): group for group in found if group is not None}.values())

    def _axes(self, *names: str) -> DeviceMesh:
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes")
        return self.devices[names]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """The mesh of the degrees asked for. Raises :class:`UserError` where they do not fit the ranks."""
    degrees = degrees_of(parallel, environment)
    pp, replicate, shard, cp, tp = degrees
    devices = context = None
    sizes = (pp, replicate, shard * cp, tp)
    only = [axis for axis, size in zip(AXES, sizes, strict=True) if size == environment.world_size > 1]
    if only and dist.group.WORLD is not None and dist.get_backend() == SMDDP:
        # all ranks are one axis and have a group already; it allows no other in a job of replicas
        devices = DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=(only[0],))
    elif environment.world_size > 1:
        devices = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    if cp > 1:
        around = (environment.world_size // (cp * tp), cp, tp)
        context = init_device_mesh(device.type, around, mesh_dim_names=("rest", "cp", "tp"))["cp"].get_group()
    return Mesh(*degrees, environment, devices, context)
