"""Attention round a ring of ranks is attention to all tokens at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.errors import UserError
from dltrain.models.transformer import DotProduct
from dltrain.parallel.ring import ring_attention
from dltrain.parallel.tokens import Role, share_context
from dltrain.testing.ranks import run_ranks

TOKENS = 6  # of each rank


def drawn(seed: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """[n, heads, tokens of all ranks, width of a head]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, TOKENS * ranks, 8, generator=generator).to(dtype)


def apart(rank: int, ranks: int, dtype: torch.dtype) -> list[Tensor]:
    """What this rank attends to, and the gradients of its own queries, keys and values."""
    mine = [drawn(seed, ranks, dtype).chunk(ranks, 2)[rank].contiguous().requires_grad_() for seed in range(3)]
    group = dist.group.WORLD
    assert group is not None
    out = ring_attention(*mine, group)
    out.backward(drawn(9, ranks, dtype).chunk(ranks, 2)[rank])
    return [out.detach(), *(each.grad for each in mine if each.grad is not None)]


@pytest.mark.parametrize(
    ("ranks", "dtype", "tolerance"),
    [
        (2, torch.float32, 1e-6),
        (3, torch.float32, 1e-6),
        (2, torch.bfloat16, 2e-2),
    ],
)
def test_each_rank_has_its_part_of_the_whole(ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    whole = [drawn(seed, ranks, dtype).float().requires_grad_() for seed in range(3)]
    out = F.scaled_dot_product_attention(*whole)
    out.backward(drawn(9, ranks, dtype).float())
    expected = [out.detach(), *(each.grad for each in whole if each.grad is not None)]
    found = run_ranks(apart, ranks, ranks, dtype)
    for place, what in enumerate(expected):
        together = torch.cat([parts[place].float() for parts in found], 2)
        assert (together - what).abs().max() <= tolerance * what.abs().max()


def refused(rank: int, ranks: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    told = []
    for module, role in ((DotProduct(0.1), "dot_product"), (nn.Identity(), "attend")):
        with pytest.raises(UserError) as error:
            share_context([Role("mix", module, role)], group, "ring")
        told.append(str(error.value))
    return told


def test_what_cannot_go_round_is_told() -> None:
    dropout, unknown = run_ranks(refused, 2, 2)[0]
    assert "mix drops out weights" in dropout
    assert "mix is not said to be a plain scaled dot product in Plan(tokens={...})" in unknown
