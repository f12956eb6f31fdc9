"""The model that is handed over is whole under every layout, and another run can start from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dltrain.checkpoint.export import export_model
from dltrain.config import Config, load_overrides
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plan import Plan
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.conftest import Cli
from tests.parallel.matrix import CPU
from tests.parallel.test_engine import Regression, share_of


class Normed(nn.Module):
    """Two blocks that can be split and cut, with a buffer that belongs to the state and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.first.register_buffer("scale", torch.tensor(2.0))
        self.second.register_buffer("shift", torch.zeros(()), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        returned: Tensor = self.second(self.first(values))
        return returned


class Exported(Regression):
    def model(self) -> nn.Module:
        return Normed()

    def plan(self) -> Plan:
        styles = {"0": "column", "2": "row"}
        tensor = {f"{block}.{layer}": style for block in ("first", "second") for layer, style in styles.items()}
        return Plan(units=("first", "second"), tensor=tensor, chain=("first", "second"))


def exported(rank: int, ranks: int, folder: str, overrides: dict[str, Any]) -> None:
    config = load_overrides(Config(), overrides)
    mesh = build_mesh(config.parallel, Environment(rank, ranks, rank, ranks), CPU)
    example = lambda: share_of(0, 0, 1, samples=12)  # noqa: E731
    engine = parallelize(Exported(config), config, mesh, CPU, example)
    for step in range(2):
        engine.forward_backward(share_of(step, mesh.data_rank, mesh.data_ranks, samples=12), torch.tensor(12.0))
        engine.step(0.01, 0.0)
    export_model(Path(folder), engine, {"step": 2}, {"config.yaml": b"run: {}"})


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp": (2, {"parallel.dp_shard": 2}),
    "tp": (2, {"parallel.tp": 2}),
    "pp": (2, {"parallel.pp": 2}),
    "pp x tp x fsdp": (8, {"parallel.pp": 2, "parallel.tp": 2, "parallel.dp_shard": 2}),
    "zero 3": (2, {"parallel.engine": "deepspeed", "parallel.deepspeed.stage": 3}),
}
QUICK = ("fsdp", "pp")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_layout_hands_over_the_model_of_one_process(tmp_path: Path, name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    run_ranks(exported, 1, 1, str(tmp_path / "one"), {})
    run_ranks(exported, ranks, ranks, str(tmp_path / "many"), overrides)
    one, many = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "many"))
    assert one.keys() == many.keys() == {*dict(Normed().named_parameters()), "first.scale"}
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "many" / "model.json").read_text()) == {"step": 2}
    assert (tmp_path / "many" / "config.yaml").read_bytes() == b"run: {}"
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"model.safetensors", "model.json", "config.yaml"}


def test_an_averaged_model_is_handed_over_averaged(tmp_path: Path) -> None:
    run_ranks(exported, 1, 1, str(tmp_path / "last"), {})
    run_ranks(exported, 1, 1, str(tmp_path / "averaged"), {"optim.ema": 0.9})
    last, averaged = (load_file(tmp_path / each / "model.safetensors") for each in ("last", "averaged"))
    assert not torch.equal(last["first.0.weight"], averaged["first.0.weight"])


@pytest.mark.slow
def test_a_run_starts_from_what_a_job_handed_over(cli: Cli, tmp_path: Path) -> None:
    words = ("image/classify", "--preset", "digits", "--evaluation.report", "false", "--logging.tensorboard", "false")
    job = cli("launch", "local", "--as-sagemaker", *words, "--run.length", "4ep")
    assert job.status == 0, job.err
    scores = json.loads((tmp_path / "sagemaker-local/s3/output/scores.json").read_text())
    weights = ("--model.weights", "sagemaker-local/s3/model/model.safetensors")
    fine = ("--optim.learning_rate", "1e-9", "--run.length", "1st", "--schedule.warmup", "0st")
    done = cli("train", *words, *weights, *fine)
    assert done.status == 0, done.err
    assert done.result["accuracy"] == pytest.approx(scores["accuracy"], abs=0.02)
