"""Attention round a ring of ranks is attention to all tokens at once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dltrain.errors import UserError
from dltrain.models.transformer import DotProduct
from dltrain.parallel import ring
from dltrain.parallel.ring import ring_attention
from dltrain.parallel.tokens import Role, share_context
from dltrain.testing.ranks import run_ranks
from tests.conftest import Cli

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


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [("cpu", torch.float32, 1e-6), pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu)],
)
def test_attention_to_halves_of_the_tokens_adds_up(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """What the kernels of a device return, without a rank to send to."""
    query, key, value, gradient = (drawn(seed, 2, dtype).to(device) for seed in range(4))
    whole = [each.float().requires_grad_() for each in (query, key, value)]
    expected = F.scaled_dot_product_attention(*whole)
    expected.backward(gradient.float())
    halves = list(zip(key.chunk(2, 2), value.chunk(2, 2), strict=True))
    assert ring.takes(query, key, value)
    (one, sums, *random), (two, more, *_) = (ring._attend(query, *half) for half in halves)
    out, total = ring._merged(one.float(), sums, two, more)
    out = out.to(dtype)
    parts = [ring._attend_backward(gradient, query, *half, out, total, random) for half in halves]
    found = [
        out,
        parts[0][0].float() + parts[1][0].float(),
        *(torch.cat([part[place] for part in parts], 2) for place in (1, 2)),
    ]
    for mine, wanted in zip(found, [expected.detach(), *(each.grad for each in whole)], strict=True):
        assert wanted is not None
        assert (mine.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_ring_of_gpus_gives_the_numbers_of_one(cli: Cli) -> None:
    words = ("verify", "image/classify", "--preset", "vit-tiny", "--nproc", "2", "--steps", "4")
    done = cli(*words, "--parallel.cp", "2", "--parallel.cp_attention", "ring", "--precision.compute", "bf16")
    assert done.status == 0, done.out + done.err


class Sharper(DotProduct):
    """With a scale of its own."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def refused(rank: int, ranks: int) -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    told = []
    for module, role in ((DotProduct(0.1), "dot_product"), (Sharper(), "dot_product"), (DotProduct(), "attend")):
        share_context([Role("mix", module, role)], group, "auto")  # gathered
        assert "forward" not in vars(module)
        with pytest.raises(UserError) as error:
            share_context([Role("mix", module, role)], group, "ring")
        told.append(str(error.value))
    return told


def test_what_cannot_go_round_is_told_or_gathered() -> None:
    told = run_ranks(refused, 2, 2)[0]
    assert len(told) == 3
    assert all("mix does more than a scaled dot product" in each for each in told)


def test_kernels_want_as_many_heads_of_keys() -> None:
    query, few = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 8)
    assert ring.takes(query, query, query)
    assert not ring.takes(query, few, few)
    assert not ring.takes(query, query, torch.zeros(1, 4, 2, 16))
