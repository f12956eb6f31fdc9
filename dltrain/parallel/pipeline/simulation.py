"""Playing a schedule without a model: how long its ranks wait for each other, and how much they hold.

schedule = build("1f1b", ranks=2, pieces=4)
simulate(schedule).bubble  # 0.2: of the ranks' time, if every pass costs the same for every stage
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dltrain.parallel.pipeline.schedule import Action, Schedule


@dataclass(frozen=True)
class Timeline:
    """When each action of each rank begins and ends, in the units of the costs."""

    rows: tuple[tuple[tuple[Action, float, float], ...], ...]

    @property
    def length(self) -> float:
        return max(end for row in self.rows for _, _, end in row)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        busy = sum(end - start for row in self.rows for _, start, end in row)
        return 1 - busy / (self.length * len(self.rows))

    @property
    def held(self) -> tuple[int, ...]:
        """Most activations, of a piece in a stage, that each rank holds at a time."""
        return tuple(_most_held([action for action, _, _ in row]) for row in self.rows)


def simulate(schedule: Schedule, costs: dict[str, float] | None = None, stages: Sequence[float] = ()) -> Timeline:
    """Play the schedule with no time for transfers.

    ``costs`` are those of the kinds (by default a backward pass takes twice a forward pass), ``stages`` multiplies them
    for each stage. Raises ``AssertionError`` where ranks would wait for each other for ever.
    """
    costs = costs or {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    rows: list[list[tuple[Action, float, float]]] = [[] for _ in schedule.actions]
    done: dict[Action, float] = {}
    while moved := [rank for rank, row in enumerate(rows) if len(row) < len(schedule.actions[rank])]:
        progress = False
        for rank in moved:
            action = schedule.actions[rank][len(rows[rank])]
            needs = list(_needs(action, schedule.stages))
            ready = [min((done[way] for way in ways if way in done), default=None) for ways in needs]
            if None in ready:
                continue
            start = max([rows[rank][-1][2] if rows[rank] else 0.0, *(time for time in ready if time is not None)])
            done[action] = start + costs[action.kind] * (stages[action.stage] if stages else 1.0)
            rows[rank].append((action, start, done[action]))
            progress = True
        assert progress, f"{schedule.name} with {len(rows)} ranks and {schedule.pieces} pieces waits for itself"
    return Timeline(tuple(map(tuple, rows)))


def _needs(action: Action, stages: int) -> Iterator[tuple[Action, ...]]:
    """What has to be done before, each in one of several ways."""
    kind, stage, piece = action
    if kind == "F":
        if stage:
            yield (Action("F", stage - 1, piece),)
        return
    if kind == "W":
        yield (Action("I", stage, piece),)
        return
    yield (Action("F", stage, piece),)
    if stage < stages - 1:
        yield (Action("B", stage + 1, piece), Action("I", stage + 1, piece))


def _most_held(actions: Sequence[Action]) -> int:
    held = most = 0
    for action in actions:
        held += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        most = max(most, held)
    return most
