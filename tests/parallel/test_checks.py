"""What is refused of a layout before a model is built, and what is named instead; and gloo's average."""

from __future__ import annotations

import time
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dltrain.config import Config, Parallel, load_overrides
from dltrain.degrees import Degrees, degrees_of, nearest_legal
from dltrain.errors import UserError
from dltrain.parallel import averaging
from dltrain.parallel.checks import SPLITTING, check_layout, layout_for_scoring
from dltrain.parallel.pipeline.schedule import NAMES, build
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.conftest import Cli
from tests.parallel import test_engine


def config_of(**settings: Any) -> Config:
    return load_overrides(Config(), {name.replace("__", "."): value for name, value in settings.items()})


def here(ranks: int, of_a_node: int = 0) -> Environment:
    return Environment(0, ranks, 0, of_a_node or ranks)


@pytest.mark.parametrize(
    ("ranks", "settings", "expected"),
    [
        (4, {}, (1, 4, 1, 1, 1)),
        (8, {"dp_shard": -1}, (1, 1, 8, 1, 1)),
        (8, {"dp_shard": 2, "tp": 2}, (1, 2, 2, 1, 2)),
        (8, {"pp": 2, "dp_replicate": 2, "dp_shard": -1}, (2, 2, 2, 1, 1)),
    ],
)
def test_what_is_left_open_takes_the_ranks_that_are_left(
    ranks: int, settings: dict[str, int], expected: tuple[int, ...]
) -> None:
    config = config_of(**{f"parallel__{name}": value for name, value in settings.items()})
    assert degrees_of(config.parallel, here(ranks)) == Degrees(*expected)


REFUSED = [
    (6, {"parallel__tp": 4}, "parallel.tp is 4, which does not divide the 6 ranks of a node",
     ["are --parallel.tp 3, or --parallel.tp 6, or --parallel.tp 2"]),
    (6, {"parallel__pp": 4}, "parallel.pp 4 x parallel.tp 1 = 4 does not divide the 6 ranks",
     ["are --parallel.pp 3, or --parallel.pp 6, or --parallel.pp 2"]),
    (8, {"parallel__tp": 2, "parallel__dp_shard": 8}, "parallel.dp_shard is 8, which does not divide the 4 ranks that",
     ["are --parallel.dp_shard 4, or --parallel.tp 1"]),
    (4, {"parallel__dp_replicate": 2, "parallel__dp_shard": 1}, "parallel.tp 1 = 2, but there are 4 ranks",
     ["--parallel.tp 2", "--parallel.dp_shard 2"]),
    (4, {"data__global_batch_size": 3}, "data.global_batch_size is 3, smaller than the 4 data ranks; give at least 4",
     ["take --parallel.tp 2", "or --parallel.pp 2"]),
    (2, {"parallel__pp": 2, "parallel__schedule": "zbv_zero_bubble", "precision__compile": True},
     "zbv_zero_bubble goes backward in two parts, and a compiled stage in one",
     ["take 1f1b or interleaved_1f1b, or set precision.compile false"]),
    (2, {"parallel__pp": 2, "parallel__schedule": "zbv_zero_bubble", "parallel__activation_checkpointing": "full"},
     "each weight would compute its unit anew", ["take 1f1b or interleaved_1f1b"]),
    (1, {"parallel__activation_checkpointing": "budget"}, "budget is the compiler's", ["set precision.compile true"]),
    (1, {"parallel__meta": True, "precision__float8": True}, "parallel.meta fills the layers that were built", []),
    (2, {"parallel__offload": True}, "this layout shards nothing", ["set parallel.dp_shard"]),
    (2, {"precision__reduce": "bf16"}, "precision.reduce is bf16, which is FSDP2's", ["parallel.compress"]),
    (2, {"parallel__prefetch": 1}, "parallel.prefetch is 1, and no parameter is sharded", ["parallel.prefetch 0"]),
    (2, {"parallel__compress": "fp16", "parallel__dp_shard": 2}, "parallel.compress is fp16, which is DDP's",
     ["set parallel.compress none"]),
    (2, {"parallel__bucket_mib": 5.0, "parallel__tp": 2}, "parallel.bucket_mib is 5.0, which is DDP's",
     ["set parallel.bucket_mib 0"]),
    (2, {"parallel__compress": "powersgd", "parallel__pp": 2}, "parallel.compress is powersgd, which is DDP's", []),
    (2, {"parallel__compress": "powersgd", "run__nonfinite": "skip"}, "would never be finite again",
     ["set run.nonfinite stop"]),
    (2, {"parallel__pp": 2, "parallel__schedule": "dualpipe_v", "parallel__micro_batch": 32},
     "needs at least 4 micro-batches, and there are 2", ["make parallel.micro_batch smaller"]),
    (2, {"parallel__pp": 2, "parallel__stages_per_rank": 2}, "1f1b has one stage on each rank",
     ["take interleaved_1f1b"]),
    (2, {"parallel__pp": 2, "parallel__schedule": "interleaved_1f1b", "parallel__micro_batch": 22},
     "rounds of parallel.pp 2, and there are 3", ["set parallel.micro_batch"]),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "settings", "found", "instead"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_a_layout_that_cannot_be_is_told_with_what_can(
    ranks: int, settings: dict[str, Any], found: str, instead: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        check_layout(config_of(**{"data__global_batch_size": 64, **settings}), here(ranks))
    assert found in str(refused.value)
    for words in instead:
        assert words in str(refused.value)


def test_a_run_is_scored_on_other_ranks_than_it_was_trained_on() -> None:
    split = config_of(parallel__tp=2, parallel__pp=2, parallel__sequence=True, parallel__micro_batch=4)
    assert layout_for_scoring(split, here(4), []) == (split, "")
    usual, said = layout_for_scoring(split, here(1), ["data.evaluation"])
    assert usual.parallel == Parallel(micro_batch=4)
    assert said == (
        "scored under the default layout, for the run's does not fit: parallel.tp is 2, which does not divide the 1 "
        "rank of a node"
    )
    offloaded = config_of(parallel__dp_shard=4, parallel__offload=True, precision__reduce="bf16")
    assert layout_for_scoring(offloaded, here(2), [])[0].parallel == Parallel()
    with pytest.raises(UserError, match=r"parallel\.tp is 2"):
        layout_for_scoring(split, here(1), ["parallel.sequence"])
    assert layout_for_scoring(split, here(1), ["parallel.micro_batch"])[0].parallel.micro_batch == 4


def test_one_process_takes_a_recipe_that_says_how_ranks_talk() -> None:
    for settings in ({"parallel__prefetch": 1}, {"parallel__compress": "fp16"}, {"parallel__bucket_mib": 5.0}):
        assert check_layout(config_of(**settings), here(1)) == Degrees(1, 1, 1, 1, 1)


def test_split_layers_are_offered_within_a_node_alone() -> None:
    near = nearest_legal(config_of(parallel__tp=8).parallel, here(8, of_a_node=2))
    assert near.startswith("--parallel.tp 2")
    assert "tp 4" not in near
    assert "tp 8" not in near


def test_every_layout_that_is_named_is_legal() -> None:
    for ranks in (1, 6, 8, 12):
        for asked in (
            {"tp": 5},
            {"pp": 7},
            {"dp_shard": 5},
            {"dp_replicate": 9, "dp_shard": 1},
            {"dp_shard": -1, "cp": 5},
        ):
            parallel = config_of(**{f"parallel__{name}": value for name, value in asked.items()}).parallel
            with pytest.raises(UserError):
                degrees_of(parallel, here(ranks))
            for settings in nearest_legal(parallel, here(ranks)).split(", or "):
                words = [word.removeprefix("--parallel.") for word in settings.split()]
                named = dict(zip(words[::2], map(int, words[1::2]), strict=True))
                assert degrees_of(parallel.replace(**named), here(ranks))._asdict().items() >= named.items()


def test_the_schedules_that_split_are_those_that_say_so() -> None:
    assert tuple(name for name in NAMES if build(name, 2, 4).splits) == SPLITTING


def test_the_command_line_refuses_before_a_rank_starts(cli: Cli) -> None:
    began = time.monotonic()
    done = cli("train", "image/classify", "--preset", "digits", "--nproc", "4", "--parallel.tp", "3")
    assert done.status == 2
    assert "which does not divide the 4 ranks of a node" in done.err
    assert time.monotonic() - began < 20  # nothing was imported or started


def sums_instead(rank: int, ranks: int) -> tuple[bool, list[float], list[float]]:
    """A build of torch whose gloo sums: whether it is found, FSDP2's losses, and its norms had it not been found."""
    scatter = getattr(dist, averaging.SCATTER)

    def summing(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, *rest: Any, **named: Any) -> Any:
        return scatter(output, input, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, *rest, **named)

    setattr(dist, averaging.SCATTER, summing)
    found = averaging.averages(dist.group.WORLD)
    with redirect_stderr(StringIO()) as told:
        losses = test_engine.train(rank, ranks, {"parallel.dp_shard": ranks})[0]
    assert rank or f"gloo of torch {torch.__version__} does not average" in told.getvalue()
    averaging.averages = lambda group: True
    unmended = test_engine.train(rank, ranks, {"parallel.dp_shard": ranks})[1]
    return found, losses, unmended


def test_a_gloo_that_sums_is_found_and_gradients_stay_right() -> None:
    expected, norms, _ = run_ranks(test_engine.train, 1, 1, {})[0]
    for averaged, losses, unmended in run_ranks(sums_instead, 2, 2):
        assert not averaged
        assert losses == pytest.approx(expected, abs=1e-5)
        assert unmended[0] == pytest.approx(2 * norms[0], rel=1e-4)  # two ranks' sum
    assert run_ranks(averages_here, 2) == [True, True]


def averages_here(rank: int) -> bool:
    return averaging.averages(dist.group.WORLD)
