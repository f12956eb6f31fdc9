"""``parallel.micro_batch auto``: the most samples that every rank has the memory for in one pass, found before the run.

No pass is made that could run out of memory, for where shards are gathered or layers are split, the other ranks would
wait in it for ever. Memory at the peak of a pass is that of whichever moment takes the most, and at each moment it is
what was there before the pass, and more that grows at most in proportion to the samples. So n samples that took
``used`` beyond what was there promise that m > n take at most m / n times as much. A small pass is measured, the ranks
agree on the largest size that its measure promises, and that one is measured in turn, until it grows no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam, Optimizer

from dltrain.errors import UserError

SHARE = 0.9
"""Of a GPU's memory that is free or ours already: what a pass may take at its peak."""

_FIRST = 2  # samples: batch norm refuses one
_JUMP = 4  # sizes grow by no more at a time: libraries choose other kernels, with other workspaces, for other sizes
_WORTH_IT = 1.05  # how much larger the next size must be to be measured


@dataclass(frozen=True)
class Measure:
    """Bytes: allocated before a pass, at its peak, and what it may take at most."""

    before: int
    peak: int
    limit: int

    def promises(self, samples: int) -> int:
        """How many samples surely fit, when these took so much."""
        return int((self.limit - self.before) * samples / max(self.peak - self.before, 1))


def probe(most: int, attempt: Callable[[int], None], optimizer: Optimizer, device: torch.device) -> int:
    """The size of micro-batches for ``most`` samples, the same on every rank; collective.

    ``attempt`` makes the passes of a step in micro-batches of so many samples, forward and backward. Passes of a batch
    are then of about one size, and none is of a single sample, which batch norm refuses, where that can be helped.
    Raises :class:`UserError` where one sample is too many.
    """
    with _reserved(optimizer, device):
        size = largest(most, lambda samples: _agreed(_promised(attempt, samples, device), device))
    if not size:
        raise UserError(
            "parallel.micro_batch auto found no memory for a single sample on every rank; make the model or its inputs "
            "smaller, set precision.compute bf16, or shard with parallel.dp_shard"
        )
    even = -(-most // -(-most // size))
    return next((smaller for smaller in range(even, 1, -1) if most % smaller != 1), even)


def largest(most: int, promised: Callable[[int], int]) -> int:
    """The largest size up to ``most`` that fits, 0 for none; ``promised(size)`` tries one and says what fits then."""
    size, best, too_many = min(_FIRST, most), 0, most + 1
    while size > best:
        fits = min(promised(size), too_many - 1)
        if fits < size:  # of the first alone: a measure promises no less than it took
            size, too_many = max(fits, best), size
            continue
        best = size
        if fits >= min(_WORTH_IT * size, size + 1):
            size = min(fits, _JUMP * size)
    return best


def _promised(attempt: Callable[[int], None], samples: int, device: torch.device) -> int:
    try:
        return measured(lambda: attempt(samples), device).promises(samples)
    except torch.OutOfMemoryError as error:  # of the very first: the others follow from a measure
        raise UserError(
            f"parallel.micro_batch auto found no memory for {samples} samples on a rank ({error}); make the model or "
            "its inputs smaller, set precision.compute bf16, or shard with parallel.dp_shard"
        ) from error


def measured(passes: Callable[[], None], device: torch.device) -> Measure:
    """What ``passes`` take; a host's memory has no bound that would be known."""
    if device.type != "cuda":
        passes()
        return Measure(before=0, peak=1, limit=1 << 40)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    passes()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return Measure(before, peak, int(SHARE * (free + torch.cuda.memory_reserved(device))))


def _agreed(samples: int, device: torch.device) -> int:
    if not dist.is_initialized():
        return samples
    fewest = torch.tensor(samples, device=device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return int(fewest.item())


@contextmanager
def _reserved(optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Room for what AdamW makes in its first step, two moments of every parameter."""
    held: list[Tensor] = []
    if device.type == "cuda" and isinstance(optimizer, Adam) and not optimizer.state:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        held += [torch.empty_like(each) for each in parameters for _ in range(2)]
    yield
    held.clear()
