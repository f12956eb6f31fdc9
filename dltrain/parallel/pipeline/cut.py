"""Cutting a model into stages, where its plan says that its forward is a chain of modules.

Every rank builds the whole model and keeps the modules of its own stages; the others leave an :class:`Absent` under
their name, so that every parameter keeps the name it has in the whole model, which checkpoints and hooks go by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dltrain.errors import UserError
from dltrain.parallel.pipeline.discover import MODES, played
from dltrain.parallel.plan import Plan, matching


@dataclass(frozen=True)
class Link:
    """One module of the chain; ``again``: it is given the model's inputs, too, after what comes before it."""

    name: str
    module: nn.Module
    again: bool


class Stage(nn.Module):
    """Some links in a row: what the last stage returned, or the model's inputs, to what the next stage is given."""

    def __init__(self, links: Sequence[Link]) -> None:
        super().__init__()
        self.links = nn.ModuleList(link.module for link in links)
        self._again = [link.again for link in links]

    def forward(self, values: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
        for link, again in zip(self.links, self._again, strict=True):
            returned = link(*values, *(inputs if again else ()))
            values = returned if isinstance(returned, tuple) else (returned,)
        return returned


class Absent(nn.Module):
    """Stands where a module of another stage is in the whole model."""


def chain(model: nn.Module, plan: Plan) -> list[Link]:
    """The links of the model in their order.

    Raises :class:`UserError` for a plan without a chain, one that matches nothing, and one that leaves parameters out
    or takes them twice.
    """
    if not plan.chain:
        raise UserError(
            f"the plan of {type(model).__name__} does not say how to cut it into stages; name the modules that its "
            "forward calls one after another in Plan(chain=(...)), or give parallel.pp 1"
        )
    links = [
        Link(name, module, pattern in plan.with_inputs)
        for pattern in plan.chain
        for name, module in matching(model, pattern, bare=True).items()
    ]
    for pattern in plan.with_inputs:
        if pattern not in plan.chain:
            raise UserError(f"the plan gives inputs to {pattern!r}, which is not in its chain")
    _refuse_gaps(model, links)
    return links


def refuse_other_forward(model: nn.Module, links: Sequence[Link], inputs: tuple[Any, ...]) -> None:
    """Raises :class:`UserError` where the model's forward is not these links, each given what the one before returned,
    in evaluation and in training: a stage would leave out whatever it does between them."""
    for training, passes in MODES:
        _refuse_other_pass(model, links, inputs, training, passes)


def _refuse_other_pass(
    model: nn.Module, links: Sequence[Link], inputs: tuple[Any, ...], training: bool, passes: int
) -> None:
    seen, moved, whole = played(model, inputs, training, partial(_noting, links), passes)
    kind = f"{type(model).__name__} {'in training' if training else 'in evaluation'}"
    if [name for name, _, _ in seen] != [link.name for link in links]:
        said, done = (", ".join(names) for names in ([link.name for link in links], [name for name, _, _ in seen]))
        raise UserError(
            f"the plan's chain of {kind} is {said}, and its forward calls {done or 'none of them'}; name modules "
            "in the order of the forward, each once"
        )
    before, last = moved, ""
    for (name, given, returned), link in zip(seen, links, strict=True):
        expected = (*before, *(moved if link.again else ()))
        if list(map(id, given)) != list(map(id, expected)):
            inputs_too = " and the model's inputs" if link.again else ""
            raise UserError(
                f"the plan's chain of {kind} gives {name} what {last or 'the model'} "
                f"{'returned' if last else 'is given'}{inputs_too}, and its forward gives it something else; move what "
                "it does in between into one of the modules, or name them in Plan(with_inputs=(...))"
            )
        before, last = returned if isinstance(returned, tuple) else (returned,), name
    if seen[-1][2] is not whole:
        raise UserError(
            f"the plan's chain of {kind} ends with {last}, and its forward returns something else; move what it does "
            f"after it into {last}"
        )


Seen = list[tuple[str, tuple[Any, ...], Any]]


def _noting(links: Sequence[Link], model: nn.Module) -> Seen:
    seen: Seen = []
    for link in links:
        model.get_submodule(link.name).register_forward_hook(partial(_note, seen, link.name))
    return seen


def _note(seen: Seen, name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
    seen.append((name, given, returned))


def costs_of(model: nn.Module, names: Sequence[str], inputs: tuple[Any, ...]) -> list[int]:
    """Floating-point operations of each module in a forward pass of ``inputs``.

    At least 1 each, so that modules without matrix products are shared out as well.
    """
    with FlopCounterMode(display=False) as counter:
        played(model, inputs, False, lambda _: counter.flop_counts.clear())
    counted = counter.get_flop_counts()
    prefix = type(model).__name__
    return [1 + sum(counted.get(f"{prefix}.{name}", {}).values()) for name in names]


def balanced(costs: Sequence[float], parts: int) -> list[range]:
    """Consecutive parts, none empty, whose largest sum is as small as can be; the first such cut from the left."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][n]: smallest largest sum of the first n links in k + 1 parts, and where the last part begins
    best = [[(sums[end], 0) for end in range(len(sums))]]
    for part in range(1, parts):
        row = [(float("inf"), 0)] * len(sums)
        for end in range(part + 1, len(sums)):
            row[end] = min((max(best[-1][start][0], sums[end] - sums[start]), start) for start in range(part, end))
        best.append(row)
    cuts, end = [], len(costs)
    for row in reversed(best):
        cuts.append(range(row[end][1], end))
        end = row[end][1]
    return cuts[::-1]


def keep(model: nn.Module, links: Sequence[Link], mine: Sequence[Link]) -> None:
    """Leave ``mine`` alone of all links in ``model``, in place."""
    kept = {link.name for link in mine}
    for link in links:
        if link.name not in kept:
            model.set_submodule(link.name, Absent())


def _refuse_gaps(model: nn.Module, links: Sequence[Link]) -> None:
    """Every parameter and buffer belongs to one link."""
    owner: dict[int, str] = {}
    for link in links:
        for tensor in (*link.module.parameters(), *link.module.buffers()):
            other = owner.setdefault(id(tensor), link.name)
            if other != link.name:
                raise UserError(
                    f"{other} and {link.name} of {type(model).__name__} share a weight, and stages of a pipeline "
                    "cannot; give parallel.pp 1, or the two weights of their own"
                )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in owner:
            raise UserError(
                f"the plan's chain leaves out {name} of {type(model).__name__}; move it into one of "
                f"{', '.join(link.name for link in links[:3])}, ... or add its module to the chain"
            )
