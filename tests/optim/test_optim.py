"""Schedules by arithmetic, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dltrain.config import Config, Length, Optim, Schedule
from dltrain.errors import UserError
from dltrain.optim.optimizer import build_optimizer, skip_if_nonfinite
from dltrain.optim.schedule import build_schedule


def steps_of(length: Length) -> int:
    """Epochs of 100 samples in batches of 10."""
    return int(length.value) * (10 if length.unit == "ep" else 1)


def test_warm_up_then_cosine() -> None:
    # epochs of 100 samples in batches of 10: 1ep of warm-up is 10 of 50 steps
    rate = build_schedule(Schedule(warmup=Length.parse("1ep"), final=0.1), 2.0, 50, steps_of)
    assert [rate.at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate.at(10) == pytest.approx(2.0)
    assert rate.at(30) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert rate.at(50) == rate.at(60) == pytest.approx(0.2)


def test_steps_at_milestones_in_epochs_and_steps() -> None:
    milestones = (Length.parse("2ep"), Length.parse("30st"))
    rate = build_schedule(Schedule(name="step", milestones=milestones, gamma=0.5), 1.0, 50, steps_of)
    assert [rate.at(step) for step in (0, 19, 20, 29, 30, 49)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule.warmup 9ep is 90 steps, longer than the run's 50"):
        build_schedule(Schedule(warmup=Length.parse("9ep")), 1.0, 50, steps_of)


def test_biases_norms_and_named_parameters_do_not_decay() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(3, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    optimizer = build_optimizer(model, Optim(weight_decay=0.3, no_decay=("table.*",)))
    shapes = {
        group["weight_decay"]: sorted(tuple(p.shape) for p in group["params"]) for group in optimizer.param_groups
    }
    assert shapes == {0.3: [(4, 4)], 0.0: [(3, 4), (4,), (4,), (4,)]}
    with pytest.raises(UserError, match=r"'head\.\*', which matches no parameter"):
        build_optimizer(model, Optim(no_decay=("head.*",)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter to train"):
        build_optimizer(model, Config().optim)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_itself_skips_a_step_marked_as_not_finite(name: str) -> None:
    """What an engine on a GPU relies on: weights, moments and step counters stay, and the next step is the next."""

    def trained(marks: list[float]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = build_optimizer(model, Optim(name=name))
        for number, mark in enumerate(marks):
            gradient = float("nan") if mark else number + 1.0
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            skip_if_nonfinite(optimizer, torch.tensor(mark))
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.parameters(), *states]

    for skipped, never in zip(trained([0.0, 0.0, 1.0]), trained([0.0, 0.0]), strict=True):
        assert torch.equal(skipped, never)
