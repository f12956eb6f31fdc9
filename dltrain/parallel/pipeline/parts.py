"""One rank's part of a model in a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dltrain.config import Parallel
from dltrain.errors import UserError
from dltrain.parallel.pipeline.cut import Stage, balanced, chain, costs_of, keep, refuse_other_forward
from dltrain.parallel.pipeline.discover import discovered
from dltrain.parallel.pipeline.schedule import Schedule, build, micro_batches, stages_per_rank
from dltrain.parallel.pipeline.trace import keep_tensors, traced
from dltrain.parallel.plan import Plan

Example = Callable[[int], tuple[Any, ...]]
"""The model's arguments for some micro-batch of so many samples."""


@dataclass(frozen=True)
class Parts:
    """``model`` with this rank's parameters alone, and ``stages`` that run them, by number.

    ``owners`` is the rank of each stage in the pipeline. Stages that are traced take micro-batches of ``size`` samples
    and no others; 0 is any size.
    """

    model: nn.Module
    stages: dict[int, nn.Module]
    owners: tuple[int, ...]
    size: int = 0

    @property
    def traced(self) -> bool:
        """Whether stages are traces, which call none of the model's modules."""
        return self.size > 0


def part(
    model: nn.Module,
    plan: Plan,
    parallel: Parallel,
    rank: int,
    samples: int,
    example: Example,
    before_tracing: Callable[[], None],
) -> Parts:
    """Cut the model, in place, to the stages of ``rank``, so that all cost about the same in a forward pass.

    By the plan's chain, or the one its forward turns out to be, or by tracing, which ``before_tracing`` may refuse.
    ``samples`` are those of each step.
    Raises :class:`UserError` for a model that cannot be cut so often, and a number of micro-batches that does not fit.
    """
    schedule, size = schedule_of(parallel, samples)
    owners, inputs = schedule.owners, example(size)
    found = plan.chain or discovered(model, inputs)
    if found and (plan.chain or len(found) >= len(owners)):
        return Parts(model, dict(_chained(model, replace(plan, chain=found), inputs, owners, rank)), owners)
    before_tracing()
    return Parts(model, dict(_traced(model, plan, inputs, owners, rank)), owners, size)


def schedule_of(parallel: Parallel, samples: int) -> tuple[Schedule, int]:
    """The schedule of a step of so many samples, and the samples of a micro-batch. Raises :class:`UserError`."""
    stages = parallel.pp * (parallel.stages_per_rank or stages_per_rank(parallel.schedule))
    number, size = micro_batches(samples, parallel.micro_batch, stages, parallel.pp)
    return build(parallel.schedule, parallel.pp, number, parallel.stages_per_rank), size


def units_in_order(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the units, at which a model that is no chain is cut, in the order of the model."""
    return [name for name, _ in sorted(plan.found(model).items(), key=lambda item: _place(model, item[0]))]


def _chained(
    model: nn.Module, plan: Plan, inputs: tuple[Any, ...], owners: Sequence[int], rank: int
) -> list[tuple[int, nn.Module]]:
    links = chain(model, plan)
    refuse_shallow(model, len(links), "names", len(owners))
    refuse_other_forward(model, links, inputs)
    cuts = balanced(costs_of(model, [link.name for link in links], inputs), len(owners))
    mine = {number: [links[place] for place in cut] for number, cut in enumerate(cuts) if owners[number] == rank}
    keep(model, links, [link for some in mine.values() for link in some])
    return [(number, Stage(some)) for number, some in mine.items()]


def _traced(
    model: nn.Module, plan: Plan, inputs: tuple[Any, ...], owners: Sequence[int], rank: int
) -> list[tuple[int, nn.Module]]:
    units = units_in_order(model, plan)
    refuse_shallow(model, len(units), "finds", len(owners))
    cuts = balanced(costs_of(model, units, inputs), len(owners))
    stages = traced(model, inputs, [units[cut[0]] for cut in cuts[1:]])
    mine = {number: stage for number, stage in enumerate(stages) if owners[number] == rank}
    keep_tensors(model, list(mine.values()))
    return list(mine.items())


def _place(model: nn.Module, name: str) -> int:
    return [other for other, _ in model.named_modules()].index(name)


def refuse_shallow(model: nn.Module, modules: int, does: str, stages: int) -> None:
    """Raises :class:`UserError` for more stages than modules."""
    if not modules:
        raise UserError(
            f"the plan of {type(model).__name__} {does} no modules to share out over {stages} stages of a pipeline; "
            "name its blocks in Plan(units=(...)), or the modules that its forward calls one after another in "
            "Plan(chain=(...))"
        )
    if modules < stages:
        raise UserError(
            f"the pipeline has {stages} stages, and the plan of {type(model).__name__} {does} {modules} modules to "
            "share out; give parallel.pp or parallel.stages_per_rank less, or a deeper model"
        )
