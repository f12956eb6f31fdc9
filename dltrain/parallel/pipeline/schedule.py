"""Who computes what, and in which order: pipeline schedules as tables of integers.

A batch is cut into pieces (micro-batches) and the model into stages. A schedule gives every rank its stages and the
order of its actions. Every stage takes the pieces of the backward pass in their order, so that gradients are summed as
on one process, to the last bit.

    build("1f1b", ranks=2, pieces=4).actions[1]  # (F 1 0, B 1 0, F 1 1, B 1 1, ...): kind, stage, piece
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple, get_args

from dltrain.errors import UserError

Name = Literal[
    "gpipe", "1f1b", "looped_bfs", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"
]
NAMES: tuple[str, ...] = get_args(Name)

Kind = Literal["F", "B", "I", "W"]
"""Forward; backward, whole, or in two parts: gradients of the inputs, and gradients of the weights."""


class Action(NamedTuple):
    """One pass of one piece through one stage."""

    kind: Kind
    stage: int
    piece: int


@dataclass(frozen=True)
class Schedule:
    """``owners`` is the rank of each stage; ``actions`` are those of each rank, in order."""

    name: str
    pieces: int
    owners: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.owners)

    @cached_property
    def splits(self) -> bool:
        """Whether gradients of weights wait while those of inputs go on."""
        return any(action.kind == "W" for row in self.actions for action in row)

    def stages_of(self, rank: int) -> list[int]:
        return [stage for stage, owner in enumerate(self.owners) if owner == rank]


def build(name: str, ranks: int, pieces: int, per_rank: int = 0) -> Schedule:
    """The schedule ``name`` for so many pieces, with ``per_rank`` stages on every rank; 0 takes what is usual for it.

    GPipe (Huang et al., 2019); 1F1B (Narayanan et al., PipeDream-Flush, 2021); looped BFS (Lamy-Poirier, 2023);
    interleaved 1F1B (Narayanan et al., Megatron-LM, 2021) and its zero-bubble form; ZB-V (Qi et al., "Zero Bubble
    Pipeline Parallelism", 2024); DualPipeV (DeepSeek, 2025). Raises :class:`UserError` for numbers that do not fit.
    """
    per_rank = per_rank or stages_per_rank(name)
    check_schedule(name, ranks, pieces, per_rank)
    owners = _in_a_v(ranks) if name in _V.names else tuple(stage % ranks for stage in range(ranks * per_rank))
    rows = [_merged(_FORMS[name](rank, ranks, pieces, per_rank)) for rank in range(ranks)]
    return Schedule(name, pieces, owners, tuple(rows))


def stages_per_rank(name: str) -> int:
    """How many stages each rank has unless it is said."""
    return 1 if name in ("gpipe", "1f1b") else 2


def forward_only(owners: Sequence[int], pieces: int) -> Schedule:
    """Without a backward pass: every rank's stages in turn, each for all pieces."""
    rows = [
        tuple(
            Action("F", stage, piece) for stage, owner in enumerate(owners) if owner == rank for piece in range(pieces)
        )
        for rank in range(max(owners) + 1)
    ]
    return Schedule("forward", pieces, tuple(owners), tuple(rows))


def micro_batches(samples: int, size: int, stages: int, ranks: int) -> tuple[int, int]:
    """Into how many pieces of which size a rank's samples are cut; ``size`` is the one asked for, 0 leaves it open."""
    if size:
        return -(-samples // size), size
    number = max(stages, 2 * ranks)
    return number, -(-samples // number)


_Form = Callable[[int, int, int, int], Iterator[Action]]


def _flush(rank: int, ranks: int, pieces: int, per_rank: int) -> Iterator[Action]:
    """All forward passes, then all backward ones: GPipe; with several stages a rank, looped BFS."""
    stages = [rank + turn * ranks for turn in range(per_rank)]
    yield from (Action("F", stage, piece) for stage in stages for piece in range(pieces))
    yield from (Action("B", stage, piece) for stage in reversed(stages) for piece in range(pieces))


def _alternating(rank: int, ranks: int, pieces: int, per_rank: int, split: bool = False) -> Iterator[Action]:
    """1F1B: after a warm-up, one forward and one backward pass in turn.

    With several stages a rank, pieces go through them in rounds of as many as there are ranks. With ``split``,
    gradients of weights wait behind those of as many inputs as there are ranks before this one, and fill the gaps.
    """
    stages = [rank + turn * ranks for turn in range(per_rank)]
    rounds = [range(first, min(first + ranks, pieces)) for first in range(0, pieces, ranks)]
    forwards = [Action("F", stage, piece) for part in rounds for stage in stages for piece in part]
    backwards = [Action("B", stage, piece) for part in rounds for stage in reversed(stages) for piece in part]
    warmup = ranks - rank - 1 if per_rank == 1 else (per_rank - 1) * ranks + 2 * (ranks - rank - 1)
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for ahead, behind in zip(forwards[warmup:], backwards, strict=False):
        actions += [ahead, behind]
    actions += backwards[len(forwards) - warmup :]
    yield from _deferred(actions, rank) if split else actions


def _deferred(actions: Sequence[Action], waiting: int) -> Iterator[Action]:
    left: deque[Action] = deque()
    for action in actions:
        if action.kind == "F":
            yield action
            continue
        yield action._replace(kind="I")
        left.append(action._replace(kind="W"))
        if len(left) > waiting:
            yield left.popleft()
    yield from left


class _V:
    """The two stages of a rank in a V, ``a`` on the way down and ``b`` on the way up, and what each has done so far."""

    names = ("zbv_zero_bubble", "dualpipe_v")

    def __init__(self, rank: int, ranks: int) -> None:
        self._stages = {"a": rank, "b": 2 * ranks - 1 - rank}
        self._done: dict[tuple[Kind, str], int] = {}

    def __call__(self, kind: Kind, arm: str) -> Action:
        """The next piece's action of this kind in this arm."""
        piece = self.done(kind, arm)
        self._done[kind, arm] = piece + 1
        return Action(kind, self._stages[arm], piece)

    def done(self, kind: Kind, arm: str) -> int:
        return self._done.get((kind, arm), 0)


def _in_a_v(ranks: int) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks)))


def _zbv(rank: int, ranks: int, pieces: int, _: int) -> Iterator[Action]:
    """Pieces that there are not, of a warm-up longer than the batch, are left out."""
    return (action for action in _zbv_full(rank, ranks, max(pieces, 2 * ranks - 1)) if action.piece < pieces)


def _zbv_full(rank: int, ranks: int, pieces: int) -> Iterator[Action]:
    do = _V(rank, ranks)
    yield from (do("F", "a") for _ in range(2 * (ranks - rank) - 1))
    for _ in range(rank):
        yield from (do("F", "b"), do("F", "a"))
    for _ in range(ranks - rank):
        yield from (do("F", "b"), do("I", "b"), do("W", "b"))
    while do.done("F", "b") < pieces:
        if do.done("F", "a") < pieces:
            yield do("F", "a")
        yield from (do("I", "a"), do("W", "a"), do("F", "b"), do("I", "b"), do("W", "b"))
    for _ in range(rank):
        yield from (do("I", "a"), do("I", "b"))
    for _ in range(ranks - rank):
        yield from (do("I", "a"), do("W", "a"))
    for arm in "ba":
        yield from (do("W", arm) for _ in range(pieces - do.done("W", arm)))


def _dualpipe_v(rank: int, ranks: int, pieces: int, _: int) -> Iterator[Action]:
    """Whole backward passes between forward ones in the middle, split ones where the pipeline fills and drains."""
    do, left = _V(rank, ranks), deque[Action]()
    after = ranks - rank - 1
    whole = {"a": lambda: do("B", "a"), "b": lambda: do("B", "b")}

    def split(arm: str) -> Action:
        action = do("B", arm)
        left.append(action._replace(kind="W"))
        return action._replace(kind="I")

    yield from (do("F", "a") for _ in range(2 * after))
    for _ in range(rank + 1):
        yield from (do("F", "a"), do("F", "b"))
    for _ in range(after):
        yield split("b")
        yield from (left.popleft(), do("F", "b"))
    for _ in range(pieces - 2 * ranks + rank + 1):
        yield from (do("F", "a"), whole["b"](), do("F", "b"), whole["a"]())
    for _ in range(after):
        yield from (whole["b"](), do("F", "b"), whole["a"]())
    for turn in range(rank + 1):
        # the second half is split; on every second rank it begins between the two arms
        half = (rank + 1) // 2
        yield split("b") if turn > half or (turn == half and rank % 2) else whole["b"]()
        yield split("a") if turn >= half else whole["a"]()
    for _ in range(after):
        yield left.popleft()
        yield split("a")
    yield from left


_FORMS: dict[str, _Form] = {
    "gpipe": _flush,
    "1f1b": _alternating,
    "looped_bfs": _flush,
    "interleaved_1f1b": _alternating,
    "interleaved_zero_bubble": partial(_alternating, split=True),
    "zbv_zero_bubble": _zbv,
    "dualpipe_v": _dualpipe_v,
}


def _merged(actions: Iterator[Action]) -> tuple[Action, ...]:
    """The first stage's input needs no gradient, so its backward pass is a whole one: nobody waits for the first part.

    The passes keep their places: that of the gradients of the weights.
    """
    first = [action._replace(kind="B") if action.stage == 0 and action.kind == "W" else action for action in actions]
    return tuple(action for action in first if action.stage or action.kind != "I")


def check_schedule(name: str, ranks: int, pieces: int, per_rank: int) -> None:
    """Raises :class:`UserError` where a schedule cannot have so many ranks, micro-batches and stages on each rank."""
    if name in ("gpipe", "1f1b") and per_rank != 1:
        raise UserError(
            f"parallel.schedule {name} has one stage on each rank, and parallel.stages_per_rank is {per_rank}; take "
            "interleaved_1f1b or looped_bfs for several"
        )
    if name in _V.names and per_rank != 2:
        raise UserError(
            f"parallel.schedule {name} has two stages on each rank, and parallel.stages_per_rank is {per_rank}; give 2"
        )
    least = 2 * ranks if name == "dualpipe_v" else 1
    if per_rank > 1 and name.startswith("interleaved") and pieces > ranks and pieces % ranks:
        raise UserError(
            f"parallel.schedule {name} takes micro-batches in rounds of parallel.pp {ranks}, and there are {pieces}; "
            "set parallel.micro_batch so that their number is a multiple, or take 1f1b"
        )
    if pieces < least:
        raise UserError(
            f"parallel.schedule {name} with parallel.pp {ranks} needs at least {least} micro-batches, and there are "
            f"{pieces}; make parallel.micro_batch smaller, or take zbv_zero_bubble"
        )
