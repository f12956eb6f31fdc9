"""Registers the backend ``smddp`` when it is imported, as the library does: over gloo, on CPUs.

It has the library's traits that others trip over. With ``SMDDP_REFUSES`` it takes no instance of this kind; with
``SMDDP_REPLICAS`` it is that of a job of replicas alone: no further groups, no barrier on devices.
"""

import os
from typing import Any

import torch.distributed as dist

if os.environ.get("SMDDP_REFUSES"):
    raise ValueError("SMDDP does not support this instance type: ml.m5.xlarge")


def _made(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


dist.Backend.register_backend("smddp", _made, devices=["cpu"])

if os.environ.get("SMDDP_REPLICAS"):
    _barrier = dist.barrier

    def _no_group(*_: Any, **__: Any) -> Any:
        raise RuntimeError("smddp: new_group() is not supported in a job of data parallel replicas")

    def _plain_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        if device_ids is not None:
            raise RuntimeError("smddp: barrier(device_ids) is not supported")
        return _barrier(group, async_op)

    dist.new_group = dist.distributed_c10d.new_group = _no_group
    dist.split_group = dist.distributed_c10d.split_group = _no_group
    dist.barrier = _plain_barrier
