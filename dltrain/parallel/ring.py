"""Ring attention (Liu et al., 2023): keys and values go from rank to rank, and no rank ever holds all of them.

Each rank keeps its queries. In every turn it attends to the keys and values that it has, which are on their way to the
next rank meanwhile, and adds the result to what it has so far, weighed by the sums of exponentials (log-sum-exp). In
the backward pass they go round again, and their gradients with them.

    attended = ring_attention(query, key, value, group)  # [n, heads, tokens of this rank, width of a head], all four
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ATEN = torch.ops.aten


def ring_attention(query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Scaled dot-product attention, without mask or dropout, to the tokens of all ranks; collective.

    float32, bfloat16 or float16 on a CPU, the last two on CUDA. Partial results are added up in float32.
    """
    attended: Tensor = _Ring.apply(query, key, value, group)  # type: ignore[no-untyped-call]
    return attended


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel that also tells the log-sum-exp, for tensors such as these."""
    if key.shape != value.shape or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        return False
    if query.device.type != "cuda":
        return True
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        both = torch.stack([key, value])
        ctx.group = group
        out = total = None
        random: list[Tensor] = []
        for turn in range(group.size()):
            coming = _Coming(both, group) if turn < group.size() - 1 else None
            part, sums, *random = _attend(query, both[0], both[1])
            out, total = (part.float(), sums) if out is None else _merged(out, total, part, sums)
            both = coming.wait() if coming is not None else both
        assert out is not None
        assert total is not None
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total, *random)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, total, *random = ctx.saved_tensors
        group, both = ctx.group, torch.stack([key, value])
        ours = torch.zeros_like(query, dtype=torch.float32)
        theirs = torch.zeros_like(both, dtype=torch.float32)  # gradients of the keys and values at hand
        travelling: _Coming | None = None
        for turn in range(group.size()):
            coming = _Coming(both, group) if turn < group.size() - 1 else None
            of_query, *of_both = _attend_backward(gradients[0], query, both[0], both[1], out, total, random)
            ours += of_query
            theirs = travelling.wait() if travelling is not None else theirs
            theirs += torch.stack(of_both)
            travelling = _Coming(theirs, group)  # after the last turn they are where they belong
            both = coming.wait() if coming is not None else both
        assert travelling is not None
        theirs = travelling.wait()
        return ours.to(query.dtype), theirs[0].to(key.dtype), theirs[1].to(value.dtype), None


class _Coming:
    """A tensor sent to the next rank of the ring, and the one that comes from the rank before."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        rank, ranks = group.rank(), group.size()
        self._sent, self._received = tensor, torch.empty_like(tensor)  # sent: kept until it has left
        after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        sends = dist.P2POp(dist.isend, tensor, after, group)
        receives = dist.P2POp(dist.irecv, self._received, before, group)
        self._works = dist.batch_isend_irecv([sends, receives])

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _merged(out: Tensor, total: Tensor | None, part: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of tokens: outputs [n, heads, tokens, width], log-sum-exp [n, heads, tokens]."""
    assert total is not None
    both = torch.logaddexp(total, sums)
    return out * (total - both).exp()[..., None] + part * (sums - both).exp()[..., None], both


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Output, log-sum-exp in float32, and what the backward pass of the same kernel wants besides."""
    if query.device.type == "cpu":
        out, sums = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        return out, sums
    out, sums, *_, state, unused, _ = _ATEN._scaled_dot_product_flash_attention(query, key, value)
    return out, sums, state, unused


def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, random: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three; with ``out`` and ``total`` of all tokens they are parts of the whole sum."""
    if query.device.type == "cpu":
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, out, total, 0.0, False
        )
        return found[0], found[1], found[2]
    found = _ATEN._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, out, total, None, None, query.shape[2], key.shape[2], 0.0, False, *random
    )
    return found[0], found[1], found[2]
