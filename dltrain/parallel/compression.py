"""What DDP sends of gradients, between replicas: all of them in fp32, or less.

`fp16` and `bf16` send numbers of half the size; a gradient beyond 65504 is not finite in fp16, and its step is skipped.
`powersgd` (Vogels et al., "PowerSGD", 2019) sends a matrix as two of a small rank, and adds what that left out to the
next step's gradient. What was left out belongs to this process and is not saved: a run that is resumed starts without,
and so departs from the run that was not interrupted. Over ten steps of a small ViT on two ranks, losses were 3e-4
(fp16), 3e-2 (PowerSGD of rank 1) and 7e-3 (rank 4) from those without.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dltrain.config import Parallel
from dltrain.errors import UserError

_WHOLE_PASSES = 2
"""Passes that send everything: the throw-away ones before the first step, in which DDP orders its buckets."""


def compress(model: DistributedDataParallel, parallel: Parallel) -> None:
    """Have ``model`` send gradients as ``parallel.compress`` says.

    Raises :class:`UserError` for bf16 on CPUs, which gloo does not add up.
    """
    group = dist.group.WORLD
    if parallel.compress == "bf16" and next(model.parameters()).device.type == "cpu":
        raise UserError(
            "parallel.compress is bf16, which torch promises for NCCL alone, and these ranks are on CPUs; take fp16"
        )
    if parallel.compress == "fp16":
        model.register_comm_hook(group, fp16_compress_hook)
    elif parallel.compress == "bf16":
        model.register_comm_hook(group, bf16_compress_hook)
    elif parallel.compress == "powersgd":
        state = PowerSGDState(group, parallel.powersgd_rank, start_powerSGD_iter=_WHOLE_PASSES)
        model.register_comm_hook(state, powerSGD_hook)
