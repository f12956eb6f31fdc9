"""``parallel.micro_batch auto``: the most samples that every rank has the memory for in one pass, tried before the run.

Tries are passes through the bare model, without a collective in them, so that a rank whose memory ends in the middle of
one leaves nobody waiting; after each try the ranks agree. That rules out layouts whose forward pass is itself
collective: shards, split layers and pipelines want a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam, Optimizer

from dltrain.errors import UserError

SHARE = 0.9
"""Of a GPU's memory that is free or ours already: what a pass may take at its peak."""


def probe(most: int, attempt: Callable[[int], None], optimizer: Optimizer, device: torch.device) -> int:
    """The size of micro-batches for ``most`` samples, the same on every rank; collective.

    ``attempt`` makes a pass of so many samples, forward and backward. Passes of a batch are then of about one size, and
    none is of a single sample, which batch norm refuses, where that can be helped.
    Raises :class:`UserError` where one sample is too many.
    """
    with _reserved(optimizer, device):
        size = largest(most, lambda samples: _agreed(_fits(attempt, samples, device), device))
    if not size:
        raise UserError(
            "parallel.micro_batch auto found no memory for a single sample on every rank; make the model or its inputs "
            "smaller, set precision.compute bf16, or shard with parallel.dp_shard and a number for micro_batch"
        )
    even = -(-most // -(-most // size))
    return next((smaller for smaller in range(even, 1, -1) if most % smaller != 1), even)


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits, by doubling from 2, then by halving what is left; 0 for none."""
    good, bad = 0, most + 1
    while good < most and bad > most:
        tried = min(max(2, 2 * good), most)
        good, bad = (tried, bad) if fits(tried) else (good, tried)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _fits(attempt: Callable[[int], None], samples: int, device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        attempt(samples)
    except torch.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if device.type != "cuda":
        return True  # a host's memory has no such bound
    free, _ = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_allocated(device) <= SHARE * (free + torch.cuda.memory_reserved(device))


def _agreed(fits: bool, device: torch.device) -> bool:
    if not dist.is_initialized():
        return fits
    verdict = torch.tensor(int(fits), device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict.item())


@contextmanager
def _reserved(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Room for what AdamW makes in its first step, two moments of every parameter."""
    held: list[Tensor] = []
    if device.type == "cuda" and isinstance(optimizer, Adam) and not optimizer.state:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        held += [torch.empty_like(each) for each in parameters for _ in range(2)]
    yield
    held.clear()
