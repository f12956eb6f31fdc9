"""The device mesh: the only place that builds one. The others ask for an axis by name.

Axes are ``dp_replicate, dp_shard, tp``, outermost first, so that the ranks that split layers, which talk most, are
neighbours. Degrees are checked once, here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.runtime.environment import Environment

AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True)
class Mesh:
    """Degrees of every axis and, with more than one rank, torch's mesh of them."""

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
        """This rank's group among them, counted across nodes first, so that a node reads its own lanes alone."""
        here = self.environment
        return here.local_rank // self.tp * here.nodes + here.node

    @property
    def counts(self) -> bool:
        """Whether this rank stands for those that see the same samples, in sums over all ranks."""
        return self.environment.rank % self.tp == 0

    def shard_axes(self) -> DeviceMesh:
        """The mesh FSDP2 works on: one axis of shards, or replicas of shards (HSDP)."""
        return self._axes("dp_replicate", "dp_shard") if self.dp_replicate > 1 else self._axes("dp_shard")

    def tensor_axis(self) -> DeviceMesh:
        """The ranks that share layers."""
        return self._axes("tp")

    def _axes(self, *names: str) -> DeviceMesh:
        if self.devices is None:
            raise AssertionError("a mesh of one rank has no axes")
        return self.devices[names]


def build_mesh(parallel: Parallel, environment: Environment, device: torch.device) -> Mesh:
    """Resolve -1, check that the degrees multiply to the number of ranks, and build. Raises :class:`UserError`."""
    world, tp = environment.world_size, parallel.tp
    if environment.local_world_size % tp:
        raise UserError(
            f"parallel.tp is {tp}, which does not divide the {environment.local_world_size} ranks of a node; ranks "
            "that share layers must be on one node"
        )
    replicate, shard = _resolve(parallel.dp_replicate, parallel.dp_shard, world // tp)
    if replicate * shard * tp != world:
        raise UserError(
            f"parallel.dp_replicate {replicate} x parallel.dp_shard {shard} x parallel.tp {tp} = "
            f"{replicate * shard * tp}, but there are {world} ranks; give dp_replicate or dp_shard -1, or start "
            f"{replicate * shard * tp} ranks"
        )
    devices = None
    if world > 1:
        devices = init_device_mesh(device.type, (replicate, shard, tp), mesh_dim_names=AXES)
    return Mesh(replicate, shard, tp, environment, devices)


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
