"""``parallel.micro_batch auto``: the largest size that fits on every rank, found without a trace, kept on resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from dltrain.config import Config, load_overrides
from dltrain.config.tree import AUTO
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.parallel import probe
from dltrain.parallel.checks import check_layout
from dltrain.parallel.plain import PlainEngine
from dltrain.parallel.probe import Measure, largest
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.test_engine import Normed, engine_for, share_of
from tests.test_trainer import trainer, url

__all__ = ["url"]  # a fixture

AUTOMATIC = {"parallel.micro_batch": "auto"}


@given(
    most=st.integers(1, 3000),
    limit=st.integers(1, 10**6),
    moments=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 500)), min_size=1, max_size=4),
)
def test_no_pass_takes_more_than_there_is_and_the_last_is_nearly_the_largest(
    most: int, limit: int, moments: list[tuple[int, int]]
) -> None:
    """Memory is that of the moment that takes the most, each so much and so much more for a sample."""
    tries: list[int] = []

    def peak(size: int) -> int:
        return 50 + max(fixed + grows * size for fixed, grows in moments)

    def promised(size: int) -> int:
        tries.append(size)
        return Measure(50, peak(size), 50 + limit).promises(size)

    found = largest(most, promised)
    assert all(peak(size) <= 50 + limit for size in tries if size > 2)
    assert found <= most
    assert found == 0 or peak(found) <= 50 + limit
    if 2 <= found < most:  # a twentieth of the memory may be left, or less than one sample more surely takes
        assert max(peak(found) - 50, 1) >= limit * min(1 / 1.05, found / (found + 1)) * 0.999
    assert len(tries) <= 60


@pytest.mark.gpu
def test_a_gpu_s_memory_is_filled_and_not_overfilled() -> None:
    device, unit = torch.device("cuda"), 1 << 28
    torch.zeros(1, device=device)
    free, _ = torch.cuda.mem_get_info(device)

    def passes(samples: int) -> None:
        torch.empty(samples * unit, dtype=torch.uint8, device=device)

    found = largest(10_000, lambda samples: probe.measured(lambda: passes(samples), device).promises(samples))
    assert 0.85 * free < found * unit <= free


class Hungry(Normed):
    """Passes take memory by the sample, on each rank as much as it has a number for."""

    seen = 0

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        Hungry.seen = len(batch)
        return super().inputs(batch)


def metered(samples: int, passes: Callable[[], None]) -> Measure:
    """As if so many samples fitted."""
    passes()
    return Measure(before=1000, peak=1000 + 10 * Hungry.seen, limit=1000 + 10 * samples)


def values(engine: PlainEngine) -> list[Tensor]:
    """Of parameters and buffers, as this rank has them."""
    both = (*engine.model.parameters(), *engine.model.buffers())
    return [value.to_local() if isinstance(value, DTensor) else value for value in both]


def settled(rank: int, ranks: int, limits: tuple[int, ...], layout: dict[str, Any]) -> tuple[int, bool] | str:
    """The size, and whether weights, running statistics and gradients are as before."""
    probe.measured = lambda passes, device: metered(limits[rank], passes)
    engine = engine_for(rank, ranks, {**AUTOMATIC, **layout}, Hungry)
    before = [value.clone() for value in values(engine)]
    try:
        engine.settle(lambda: share_of(0, rank, ranks, samples=20))
    except UserError as error:
        return str(error)
    same = all(torch.equal(one, two) for one, two in zip(before, values(engine), strict=True))
    same &= all(parameter.grad is None for parameter in engine.model.parameters())
    batch = share_of(1, rank, ranks, samples=20)
    engine.forward_backward(batch, torch.tensor(20.0))  # within the limits
    return engine.micro_batch, same


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((100,), 20), ((7,), 7), ((19,), 10), ((7, 3), 2), ((9, 100), 5), ((2, 2), 2)],
    ids=str,
)
def test_every_rank_takes_what_the_smallest_can(limits: tuple[int, ...], expected: int) -> None:
    """In passes of about one size: 10 samples of which 9 fit are two passes of 5. Where 3 fit, 2 are taken: 3, 3, 3 and
    1 would leave batch norm a single sample."""
    for found in run_ranks(settled, len(limits), len(limits), limits, {}):
        assert found == (expected, True)


def test_shards_take_what_the_smallest_rank_can() -> None:
    for found in run_ranks(settled, 2, 2, (9, 5), {"parallel.dp_shard": 2}):
        assert found == (5, True)


def test_no_memory_for_one_sample_is_told_on_every_rank() -> None:
    for message in run_ranks(settled, 2, 2, (0, 0), {}):
        assert "found no memory for a single sample on every rank" in message


def test_it_is_kept_by_a_resume(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(url, evaluate=False, parallel__micro_batch="auto", run__length="2st")
    assert first.engine.micro_batch == AUTO
    first.fit()
    assert first.engine.micro_batch == 16  # nothing bounds a CPU: the batch
    second = trainer(url, evaluate=False, parallel__micro_batch="auto", run__length="4st")
    second.load_state_dict({**first.state_dict(), "micro_batch": 5})
    second.fit()
    assert second.engine.micro_batch == 5


def test_it_is_found_anew_where_the_layout_is_another(url: str) -> None:
    first = trainer(url, evaluate=False, parallel__micro_batch="auto", run__length="2st")
    first.fit()
    second = trainer(url, evaluate=False, parallel__micro_batch="auto", parallel__timeout=60.0, run__length="4st")
    second.load_state_dict({**first.state_dict(), "micro_batch": 5})
    second.fit()
    assert second.engine.micro_batch == 16


def test_it_is_refused_where_it_says_more_than_a_size() -> None:
    config = load_overrides(Config(), {**AUTOMATIC, "parallel.pp": 2})
    with pytest.raises(UserError, match=r"parallel\.micro_batch is auto, .* give a number"):
        check_layout(config, Environment(0, 2, 0, 2))
    replicas = load_overrides(Config(), AUTOMATIC)
    assert replicas.model_dump(mode="json")["parallel"]["micro_batch"] == "auto"
    check_layout(replicas, Environment(0, 2, 0, 2))


def test_a_size_below_nothing_is_refused() -> None:
    settings: dict[str, Any] = {"parallel.micro_batch": -2}
    with pytest.raises(ValueError, match="micro_batch"):
        load_overrides(Config(), settings)
