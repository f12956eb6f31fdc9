"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``pp, dp_replicate, dp_shard, cp, tp``, outermost first. Degrees are checked once, here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment


@dataclass(frozen=True)
class Mesh:
    """Degrees of every axis and, with more than one rank, torch's mesh over the data axes."""

    dp_replicate: int
    dp_shard: int
    environment: Environment
    devices: DeviceMesh | None

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self) -> int:
        """This rank's number among them, counted across nodes first, so that a node reads its own lanes alone."""
        here = self.environment
        return here.local_rank * here.nodes + here.node

    def shard_axes(self) -> DeviceMesh:
        """The mesh FSDP2 works on: one axis of shards, or replicas of shards (HSDP)."""
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes to shard over")
        return self.devices if self.dp_replicate > 1 else self.devices["dp_shard"]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """Resolve -1, check that the degrees multiply to the number of ranks, and build. Raises :class:`UserError`."""
    world = environment.world_size
    replicate, shard = _resolve(parallel.dp_replicate, parallel.dp_shard, world)
    if replicate * shard != world:
        raise UserError(
            f"parallel.dp_replicate {replicate} x parallel.dp_shard {shard} = {replicate * shard}, but there are "
            f"{world} ranks; give one of them -1, or start {replicate * shard} ranks"
        )
    devices = None
    if world > 1:
        devices = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return Mesh(replicate, shard, environment, devices)


def _resolve(replicate: int, shard: int, world: int) -> tuple[int, int]:
    for name, degree in (("dp_replicate", replicate), ("dp_shard", shard)):
        if degree == 0 or (degree > 0 and world % degree):
            raise UserError(f"parallel.{name} is {degree}, which does not divide the {world} ranks")
    if replicate == shard == -1:
        return 1, world
    if replicate == -1:
        return world // shard, shard
    if shard == -1:
        return replicate, world // replicate
    return replicate, shard
