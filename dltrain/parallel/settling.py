"""The throw-away passes before the first step: what only first passes do is done in them, and nothing else remains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

_LONG = timedelta(minutes=30)
"""How long ranks wait for each other while they compile: some have more to compile, or find less in their caches."""


@contextmanager
def without_trace(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Buffers and random state come back afterwards, and gradients are gone."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


@contextmanager
def patiently(groups: Iterable[dist.ProcessGroup], seconds: float) -> Iterator[None]:
    """Collectives of ``groups`` may take half an hour, at least; then all ranks meet, and it is ``seconds`` again.

    So no rank is still compiling when another's wait is measured in ``seconds``.
    """
    groups, usual = list(groups), timedelta(seconds=seconds)
    for group in groups:
        _set_pg_timeout(max(_LONG, usual), group)
    yield
    if groups:
        dist.barrier()
    for group in groups:
        _set_pg_timeout(usual, group)
