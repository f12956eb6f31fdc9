"""``parallel.micro_batch auto``: the largest size that fits on every rank, found without a trace, kept on resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dltrain.config import Config, load_overrides
from dltrain.config.tree import AUTO
from dltrain.data.batch import Batch
from dltrain.errors import UserError
from dltrain.parallel.checks import check_layout
from dltrain.parallel.probe import largest
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.test_engine import Normed, engine_for, share_of
from tests.test_trainer import trainer, url

__all__ = ["url"]  # a fixture

AUTOMATIC = {"parallel.micro_batch": "auto"}


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_the_largest_size_is_found_in_few_tries(most: int) -> None:
    for limit in range(most + 3):
        tries: list[int] = []

        def fits(size: int, limit: int = limit, tries: list[int] = tries) -> bool:
            tries.append(size)
            return size <= limit

        assert largest(most, fits) == min(limit, most)
        assert len(tries) == len(set(tries)) <= 2 * most.bit_length() + 1
        assert max(tries) <= most


class Limited(Normed):
    """Out of memory above so many samples; each rank has a limit of its own."""

    limits: tuple[int, ...] = ()
    rank = 0

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        if torch.is_grad_enabled() and len(batch) > self.limits[self.rank]:
            raise torch.OutOfMemoryError(f"{len(batch)} samples")
        return super().inputs(batch)


def settled(rank: int, ranks: int, limits: tuple[int, ...]) -> tuple[int, bool] | str:
    """The size, and whether weights, running statistics and gradients are as before."""
    Limited.limits, Limited.rank = limits, rank
    engine = engine_for(rank, ranks, AUTOMATIC, Limited)
    before = [value.clone() for value in (*engine.model.parameters(), *engine.model.buffers())]
    try:
        engine.settle(lambda: share_of(0, rank, ranks, samples=20))
    except UserError as error:
        return str(error)
    now = (*engine.model.parameters(), *engine.model.buffers())
    same = all(torch.equal(one, two) for one, two in zip(before, now, strict=True))
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
    for found in run_ranks(settled, len(limits), len(limits), limits):
        assert found == (expected, True)


def test_no_memory_for_one_sample_is_told_on_every_rank() -> None:
    for message in run_ranks(settled, 2, 2, (0, 0)):
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


@pytest.mark.parametrize("setting", ["dp_shard", "tp", "pp"])
def test_it_is_refused_where_passes_are_collective(setting: str) -> None:
    config = load_overrides(Config(), {**AUTOMATIC, f"parallel.{setting}": 2})
    with pytest.raises(UserError, match=r"parallel\.micro_batch is auto, .* give a number"):
        check_layout(config, Environment(0, 2, 0, 2))
    replicas = load_overrides(Config(), AUTOMATIC)
    assert replicas.model_dump(mode="json")["parallel"]["micro_batch"] == "auto"
    check_layout(replicas, Environment(0, 2, 0, 2))


def test_a_size_below_nothing_is_refused() -> None:
    settings: dict[str, Any] = {"parallel.micro_batch": -2}
    with pytest.raises(ValueError, match="micro_batch"):
        load_overrides(Config(), settings)
