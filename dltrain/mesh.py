"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``pp, dp_replicate, dp_shard, tp``, outermost first, so that the ranks that split layers, which talk most, are
neighbours, and the parts of a pipeline, which talk least, lie furthest apart. Degrees are checked by ``degrees.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dltrain.config import Parallel
from dltrain.degrees import Degrees, degrees_of
from dltrain.runtime.environment import Environment


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

    def axis_group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one in the axis ``name`` alone; ``None`` where there are no others."""
        return self._axes(name).get_group() if getattr(self, name) > 1 else None

    def place_on(self, name: str) -> int:
        """This rank's place in the axis ``name``."""
        return self._axes(name).get_local_rank()

    def _axes(self, *names: str) -> DeviceMesh:
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes")
        return self.devices[names]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """The mesh of the degrees asked for. Raises :class:`UserError` where they do not fit the ranks."""
    degrees = degrees_of(parallel, environment)
    devices = None
    if environment.world_size > 1:
        devices = init_device_mesh(device.type, degrees, mesh_dim_names=Degrees._fields)
    return Mesh(*degrees, environment, devices)
