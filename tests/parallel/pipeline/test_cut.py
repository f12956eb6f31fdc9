"""A model is cut where its plan says, evenly by what its parts cost, and every parameter keeps its name."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.models.vision import vit
from dltrain.parallel.pipeline.cut import Link, Stage, balanced, chain, costs_of, keep, refuse_other_forward
from dltrain.parallel.plan import Plan


def model() -> vit.ViT:
    return vit.ViT(8, 4, 3, 5, depth=4, width=32, heads=4, registers=2)


@given(some.lists(some.integers(1, 50), min_size=1, max_size=9), some.integers(1, 5))
def test_the_costliest_part_is_as_cheap_as_any_cut_allows(costs: list[int], parts: int) -> None:
    if parts > len(costs):
        return
    found = balanced(costs, parts)
    assert [place for part in found for place in part] == list(range(len(costs)))
    assert all(len(part) for part in found)
    every = [
        max(sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), parts - 1)
    ]
    assert max(sum(costs[place] for place in part) for part in found) == min(every)


def test_costs_are_the_operations_of_each_link() -> None:
    whole = model()
    links = chain(whole, vit.PLAN)
    costs = costs_of(whole, [link.name for link in links], (torch.zeros(2, 3, 8, 8),))
    # 2 samples x 4 patches x 2 operations x 3 channels x 4 x 4 pixels x width 32
    assert costs[0] == 1 + 2 * 4 * 2 * 48 * 32
    # 2 x 6 tokens x 2 operations x (4 layers of 32 x 32, and 2 of 32 x 128), and attention's two products
    assert costs[1:5] == [1 + 12 * 2 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 2 * 2 * 6 * 6 * 32] * 4
    assert costs[5] == 1 + 2 * 2 * 32 * 5


def test_stages_one_after_another_are_the_model() -> None:
    whole, images = model().eval(), torch.randn(2, 3, 8, 8)
    links = chain(whole, vit.PLAN)
    first, second = Stage(links[:3]), Stage(links[3:])
    assert torch.equal(second((first((images,), (images,)),), (images,)), whole(images))


def test_what_is_kept_keeps_its_names() -> None:
    whole = model()
    names = [name for name, _ in whole.named_parameters()]
    links = chain(whole, vit.PLAN)
    keep(whole, links, links[2:4])
    kept = [name for name, _ in whole.named_parameters()]
    assert kept == [name for name in names if name.startswith(("blocks.1.", "blocks.2."))]


class Loose(nn.Module):
    """With a weight that belongs to the model itself, or to two links."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight
        else:
            self.scale = nn.Parameter(torch.ones(4))

    def forward(self, values: Tensor) -> Tensor:
        second: Tensor = self.second(self.first(values))
        return second


@pytest.mark.parametrize(
    ("plan", "tied", "words"),
    [
        (Plan(), False, "the plan of Loose does not say how to cut it into stages"),
        (Plan(chain=("first", "third")), False, "'third' matches no module of Loose"),
        (Plan(chain=("first", "second")), False, "leaves out scale of Loose; move it into one of first, second"),
        (Plan(chain=("first", "second")), True, "first and second of Loose share a weight"),
        (Plan(chain=("first",), with_inputs=("second",)), True, "gives inputs to 'second', which is not in its chain"),
    ],
)
def test_a_model_that_cannot_be_cut_is_told_why(plan: Plan, tied: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        chain(Loose(tied), plan)


class Between(nn.Module):
    """Doubles what its first layer gives, if it is to, before the second takes it, maybe in training alone; or what the
    second gives. It may look at values, which a copy without any does not have."""

    def __init__(self, doubled: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self._doubled, self.passes = doubled, 0

    def forward(self, values: Tensor) -> Tensor:
        middle = self.first(values)
        if self._doubled == "training" and self.training:
            middle = 2 * middle
        if self._doubled == "looks" and middle.sum() > 1e9:
            middle = 2 * middle
        self.passes += 1
        if self._doubled == "second pass" and self.passes % 2 == 0:
            middle = 2 * middle
        last: Tensor = self.second(2 * middle if self._doubled == "middle" else middle)
        return 2 * last if self._doubled == "last" else last


@pytest.mark.parametrize(
    ("plan", "doubled", "words"),
    [
        (Plan(chain=("second", "first")), "", "is second, first, and its forward calls first, second; name modules in"),
        (Plan(chain=("first", "second")), "middle", "gives second what first returned, and its forward gives it somet"),
        (
            Plan(chain=("first", "second"), with_inputs=("second",)),
            "",
            "gives second what first returned and the model's inputs, and its forward gives it something else",
        ),
        (
            Plan(chain=("first", "second")),
            "last",
            "ends with second, and its forward returns something else; move what",
        ),
    ],
)
def test_a_chain_that_is_not_the_forward_is_refused(plan: Plan, doubled: str, words: str) -> None:
    whole, inputs = Between(doubled), (torch.zeros(2, 4),)
    with pytest.raises(UserError, match=words):
        refuse_other_forward(whole, chain(whole, plan), inputs)
    for straight in (Between(), Between("looks")):
        modes = [module.training for module in straight.modules()]
        refuse_other_forward(straight, _links(straight), inputs)
        assert costs_of(straight, ["first", "second"], inputs) == [1 + 2 * 2 * 4 * 4] * 2
        assert modes == [module.training for module in straight.modules()]
        assert not any(module._forward_hooks for module in straight.modules())


def _links(model: Between) -> list[Link]:
    return [Link("first", model.first, False), Link("second", model.second, False)]
