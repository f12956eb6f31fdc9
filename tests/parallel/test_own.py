"""A task may spread its model itself, by torch's own functions; the numbers are those of the library's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dltrain.checkpoint.checkpointer import Checkpointer, step_folder
from dltrain.config import Config, load_overrides
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import RankError, run_ranks
from tests.parallel.matrix import CPU, SAMPLES, Images, share_of, whole


class Own(Images):
    """Layers split and blocks sharded by hand."""

    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        for block in model.blocks:
            if config.parallel.tp > 1:
                styles = dict.fromkeys(("query", "key", "value"), ColwiseParallel)
                parallelize_module(block.attention, mesh["tp"], {n: style() for n, style in styles.items()})
                parallelize_module(block.attention, mesh["tp"], {"out": RowwiseParallel()})
                parallelize_module(block.mlp, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            if config.parallel.dp_shard > 1:
                fully_shard(block, mesh=mesh["dp_shard"])
        if config.parallel.dp_shard > 1:
            return fully_shard(model, mesh=mesh["dp_shard"])
        replicas = mesh["dp_replicate"]
        if replicas.size() > 1:
            return DistributedDataParallel(model, process_group=replicas.get_group(), broadcast_buffers=False)
        return model


class Apart(Images):
    """Forgets that data ranks must meet."""

    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        return model


class HalfApart(Images):
    """Shards are added up, replicas of them are not."""

    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        return fully_shard(model, mesh=mesh["dp_shard"])


class Renaming(Images):
    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        return nn.Sequential(model)


class Nothing(Images):
    def parallelize(self, model: nn.Module, mesh: DeviceMesh, config: Config) -> nn.Module:
        return None  # type: ignore[return-value]


def train(
    rank: int, ranks: int, task: type[Images], overrides: dict[str, Any], load: str = "", save: str = ""
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Norms of three steps, losses of a batch held out, and weights."""
    config = load_overrides(Config(), {"optim.learning_rate": 0.003, **overrides})
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    engine = parallelize(task(config), config, mesh, CPU, lambda: share_of("vit", 0, 0, 1))
    checkpoints = Checkpointer(Path(load or save), 3, mesh.environment)
    if load:
        checkpoints.load(step_folder(Path(load), 3), engine)
    norms = []
    for step in range(3):
        batch = share_of("vit", step, mesh.data_rank, mesh.data_ranks)
        engine.forward_backward(batch, torch.tensor(float(SAMPLES)))
        norms.append(engine.step(0.003, 1.0).item())
    if save:
        checkpoints.save(3, engine, {"step": 3})
    return norms, engine.evaluate(share_of("vit", 9, 0, 1))[1].tolist(), whole(engine)


LAYOUTS = {
    "ddp 2": (2, {}),
    "fsdp 2": (2, {"parallel.dp_shard": 2}),
    "tp 2": (2, {"parallel.tp": 2}),
    "fsdp 2 x tp 2": (4, {"parallel.dp_shard": 2, "parallel.tp": 2, "parallel.micro_batch": 2}),
}


@pytest.mark.parametrize("name", ["ddp 2", "fsdp 2", "tp 2", pytest.param("fsdp 2 x tp 2", marks=pytest.mark.slow)])
def test_a_function_of_ones_own_gives_the_numbers_of_the_plan(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    norms, losses, weights = run_ranks(train, ranks, ranks, Images, overrides)[0]
    for found_norms, found_losses, found in run_ranks(train, ranks, ranks, Own, overrides):
        assert found_norms == pytest.approx(norms, rel=1e-6)
        assert found_losses == pytest.approx(losses, abs=1e-6)
        assert found.keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(found[key], weight, atol=1e-6, rtol=0)


def test_its_checkpoints_go_on_under_the_plan(tmp_path: Path) -> None:
    overrides = {"parallel.dp_shard": 2}
    run_ranks(train, 2, 2, Own, overrides, "", str(tmp_path))
    own = run_ranks(train, 2, 2, Own, overrides, str(tmp_path))[0]
    plan = run_ranks(train, 1, 1, Images, {}, str(tmp_path))[0]
    assert own[0] == pytest.approx(plan[0], rel=1e-5)


def test_one_process_is_not_asked_to_spread() -> None:
    assert run_ranks(train, 1, 1, Nothing, {})[0][0] == run_ranks(train, 1, 1, Images, {})[0][0]


@pytest.mark.parametrize(
    ("task", "overrides", "words"),
    [
        (
            Apart,
            {},
            "returned a ViT that is neither fully_shard'ed nor in .* 2 data ranks would stay apart",
        ),
        (Renaming, {"parallel.tp": 2}, "changed which parameters there are: '0.blocks.0.attention.key.bias'"),
        (Nothing, {}, "Nothing.parallelize.. returned NoneType"),
        (Own, {"parallel.pp": 2}, "spreads a whole model, and parallel.pp is 2; give parallel.pp 1"),
        (HalfApart, {}, r"has gradients meet over 1 rank\(s\), and there are 2 with samples of their own"),
        (
            Own,
            {"parallel.dp_shard": 2, "parallel.activation_checkpointing": "full"},
            "parallel.activation_checkpointing is for the library to do, and Own.parallelize.. spreads the model",
        ),
        (Own, {"parallel.dp_shard": 2, "precision.reduce": "bf16"}, "precision.reduce is for the library to do"),
        (Own, {"parallel.cp": 2}, "parallel.cp is for the library to do"),
    ],
)
def test_what_could_not_be_trained_rightly_is_refused(task: type[Images], overrides: Any, words: str) -> None:
    with pytest.raises(RankError, match=words):
        run_ranks(train, 2, 2, task, overrides)
