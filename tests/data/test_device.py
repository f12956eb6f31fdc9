"""Batches copied to a GPU one step ahead are the loader's own, in its order."""

from __future__ import annotations

import pytest
import torch

from dltrain.data.batch import Batch
from dltrain.data.device import moved_ahead


def batch(number: int) -> Batch:
    fields = {"x": torch.full((8, 3), float(number))}
    return Batch(fields, torch.ones(8), tuple(f"{number}-{place}" for place in range(8)), torch.arange(8))


@pytest.mark.gpu
def test_copies_run_one_step_ahead_and_change_nothing() -> None:
    device, asked = torch.device("cuda"), []

    def source() -> list[tuple[int, Batch]]:
        for number in range(5):
            asked.append(number)
            yield number, batch(number).pin_memory()

    for place, (label, moved) in enumerate(moved_ahead(source(), device)):
        assert label == place
        assert asked[-1] == min(place + 1, 4)
        assert moved.weight.device.type == "cuda"
        assert moved.host is not None
        assert moved.host.keys == moved.keys == batch(place).keys
        assert torch.equal(moved.fields["x"].cpu(), batch(place).fields["x"])


def test_a_copy_remembers_the_batch_of_the_host() -> None:
    one = batch(1)
    assert one.to(torch.device("cpu")) is one
    moved = one.to(torch.device("meta"))
    assert moved.host is one
    assert next(moved.split(4)).weight.device.type == "meta"
