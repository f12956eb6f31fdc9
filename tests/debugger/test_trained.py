"""Rules in real trainings: a small model with a fault is told of at the step where it shows, live and afterwards alike,
and the same model without it is left in peace. Rules about ranks are in test_faults, those about GPUs in test_rules."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain.config import Config, load_overrides
from dltrain.data.batch import Batch
from dltrain.data.dataset import open_dataset
from dltrain.data.decode import decode_fields
from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.sample import Sample
from dltrain.data.writer import ShardWriter
from dltrain.debugger.findings import Finding
from dltrain.debugger.hook import Debug
from dltrain.debugger.run import open_run
from dltrain.hooks.base import Hook, View
from dltrain.hooks.records import Records
from dltrain.mesh import build_mesh
from dltrain.metrics.classification import Classification
from dltrain.parallel.apply import parallelize
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.trainer import Trainer

CPU = torch.device("cpu")
STEPS, BATCH = 40, 16

Change = Callable[[nn.Module], Any]


class Net(nn.Module):
    """Three layers behind an embedding of the number's last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.tanh = nn.Tanh()
        self.middle = nn.Linear(16, 16)
        self.relu = nn.ReLU()
        self.bit = nn.Embedding(2, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, bits: Tensor, last: Tensor) -> Tensor:
        found: Tensor = self.head(self.relu(self.middle(self.tanh(self.stem(bits)))) + self.bit(last))
        return found


class Parity(Task):
    """Learns whether a number is odd from its bits, as -1 and 1."""

    change: Change | None = None
    label: Callable[[int], int] = staticmethod(lambda number: number % 2)
    shift = delay = 0.0
    factor: Callable[[Tensor], Tensor] = staticmethod(lambda losses: losses)

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        number = int(decode_fields(sample)["cls"])
        bits = np.array([2.0 * (number >> place & 1) - 1 for place in range(6)], dtype=np.float32)
        last = np.int64(number >> 1 & 1)
        time.sleep(self.delay)
        return {"bits": bits + np.float32(self.shift), "last": last, "cls": np.int64(self.label(number))}

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        net = Net()
        if self.change is not None:
            self.change(net)
        return net

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.fields["bits"], batch.fields["last"]

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return self.factor(F.cross_entropy(outputs, batch.fields["cls"], reduction="none"))

    def metrics(self) -> Classification:
        return Classification(["even", "odd"])


class At(Hook):
    """Does something at the start of each step."""

    def __init__(self, work: Callable[[int, View], Any]) -> None:
        self._work = work

    def step_start(self, trainer: View, batch: Batch) -> None:
        self._work(trainer.step + 1, trainer)


@dataclass
class Fault:
    """How a training goes wrong, the rule that finds it, and where."""

    rule: str
    step: int
    where: tuple[str, ...] = ()
    change: Change | None = None
    task: dict[str, Any] = field(default_factory=dict)
    hook: Callable[[int, View], Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    every: str = "4st"
    """Between evaluations."""


def trained(folder: Path, fault: Fault, healthy: bool) -> tuple[list[Finding], list[Finding]]:
    """What the rule finds live, and of the run's files."""
    with ShardWriter(str(folder / "data"), samples_per_shard=16) as writer:
        for number in range(64):
            writer.write(f"n{number}", {"cls": str(number).encode()})
    kind = Parity if healthy else type("Faulty", (Parity,), {"change": _method(fault.change), **_static(fault.task)})
    settings = {"run.length": f"{STEPS}st", "optim.learning_rate": "0.01", "schedule.name": "constant"}
    settings |= {"evaluation.every": fault.every, "debugger.every": "2st", "debugger.rules": [fault.rule]}
    config = load_overrides(Config(), {**settings, **({} if healthy else fault.settings)})
    dataset, task = open_dataset(str(folder / "data")), kind(config)
    hooks: list[Hook] = [Debug(config, Environment(), folder / "debugger"), Records(folder / "metrics.jsonl")]
    if fault.hook is not None and not healthy:
        hooks.insert(0, At(fault.hook))
    mesh = build_mesh(config.parallel, Environment(), CPU)
    order = Order(dataset.shard_sizes, config.run.seed)
    loader = Loader(dataset, order, task.sample, global_batch_size=BATCH, augment=True)
    held_out = Loader(dataset, order, task.sample, global_batch_size=32, tail="pad", epochs=1)
    engine = parallelize(task, config, mesh, CPU, loader.peek, watch=hooks[-2].model_built)
    with closing(hooks[-2]), closing(hooks[-1]):
        Trainer(config, task, engine, loader, evaluation=held_out, hooks=hooks).fit()
    run = open_run(str(folder))
    return run.findings(), list(run.judge([fault.rule]))


def _method(change: Change | None) -> Any:
    return None if change is None else staticmethod(change)


def _static(values: dict[str, Any]) -> dict[str, Any]:
    return {name: staticmethod(value) if callable(value) else value for name, value in values.items()}


def scale(layer: str, factor: float) -> Change:
    def change(net: nn.Module) -> None:
        with torch.no_grad():
            for each in net.get_submodule(layer).parameters():
                each.mul_(factor)

    return change


def fill(layer: str, value: float) -> Change:
    return lambda net: nn.init.constant_(net.get_submodule(layer).bias, value)


def detach(layer: str) -> Change:
    """Its gradients are 0."""
    return lambda net: net.get_submodule(layer).register_forward_hook(lambda module, given, output: output * 0.0)


def leap(step: int, trainer: View) -> None:
    """From step 10 on the stem's steps are a thousand times as large."""
    weight = dict(trainer.engine.named_parameters())["stem.weight"]
    if step == 10:
        weight.register_hook(lambda gradient: 1000 * gradient)


def sleep_at(*steps: int) -> Callable[[int, View], None]:
    return lambda step, trainer: time.sleep(1.2) if step in steps else None


def poison(step: int, trainer: View) -> None:
    if step == 7:
        with torch.no_grad():
            dict(trainer.engine.named_parameters())["middle.weight"][0, 0] = torch.nan


def spoilt(losses: Tensor) -> Tensor:
    """A step, one of those with gradients, in which the loss is far larger."""
    spoilt.calls += torch.is_grad_enabled()  # type: ignore[attr-defined]
    return losses + 5 * (spoilt.calls == 31)  # type: ignore[attr-defined]


spoilt.calls = 0  # type: ignore[attr-defined]

SGD = {"optim.name": "sgd", "optim.learning_rate": "0.1", "optim.weight_decay": "0"}
WEIGHTS = ("stem.weight", "middle.weight", "bit.weight", "head.weight")

FAULTS = {
    "vanishing": Fault("VanishingGradient", 1, ("gradient/stem.weight",), scale("middle", 1e-8)),
    "exploding": Fault("ExplodingTensor", 8, hook=poison, settings={"run.nonfinite": "skip"}),
    "large steps": Fault("WeightUpdateRatio:large_threshold=0.9", 1, settings={"optim.learning_rate": "10"}),
    "small steps": Fault(
        "WeightUpdateRatio", 1, settings={"optim.learning_rate": "1e-11", "optim.weight_decay": "0"}),
    "uneven steps": Fault("UnevenUpdates:factor=30", 12, ("stem.weight",), hook=leap, settings=SGD),
    "all zero": Fault("AllZero", 1, change=detach("middle")),
    "unchanged": Fault("UnchangedTensor", 4, change=detach("middle"), settings={"optim.weight_decay": "0"}),
    "dead": Fault("DeadRelu", 1, ("relu",), fill("middle", -50.0)),
    "saturated": Fault("SaturatedActivation", 1, ("tanh",), fill("stem", 60.0)),
    "varying": Fault("TensorVariance:max_threshold=50", 1, ("middle.weight",), scale("middle", 100.0)),
    "ill begun": Fault("PoorWeightInitialization", 1, change=scale("middle", 100.0)),
    "not learning": Fault("LossNotDecreasing:num_steps=8", 16, settings={"optim.learning_rate": "1e-9"}),
    "spike": Fault("LossSpike:window=20", 31, task={"factor": spoilt}),
    "overfit": Fault("Overfit:patience=2:ratio_threshold=0.5", 8, task={"factor": lambda losses: losses * (
        0.2 if torch.is_grad_enabled() else 1)}),
    "overtrained": Fault(
        "Overtraining:patience_train=3:patience_validation=3", 16, settings={"optim.learning_rate": "1e-9"}),
    "noisy": Fault("LabelNoise:learnt=0.6", 20, task={"label": lambda number: (number + (number in (3, 8, 17))) % 2},
                   settings={"optim.learning_rate": "0.02"}),
    "imbalanced": Fault(
        "ClassImbalance:samples=100", 8, ("labels/cls",), task={"label": lambda number: int(number == 5)}),
    "confused": Fault("Confusion:min_diag=0.8", 40, task={"label": lambda number: number * 7919 // 64 % 2},
                      every="0st"),
    "not centred": Fault("CheckInputImages:threshold_samples=300", 36, ("channels/stem_input_0",), task={"shift": 2.0}),
    "stalled": Fault("StalledTrainingRule:threshold=1", 13, hook=sleep_at(14)),
    "waiting": Fault("DataWait", 7, task={"delay": 0.01}, settings={"run.length": "12st"}),
}  # fmt: skip


QUICK = ("vanishing", "exploding", "uneven steps", "dead", "spike", "noisy", "imbalanced", "not centred")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAULTS]
)
def test_a_fault_is_found_where_it_is_and_nowhere_else(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    spoilt.calls = 0  # type: ignore[attr-defined]
    live, afterwards = trained(tmp_path / "faulty", fault, healthy=False)
    assert live, "it is silent"
    assert [str(each) for each in live] == [str(each) for each in afterwards]
    assert live[0].step == fault.step, live[0]
    assert set(fault.where) <= set(live[0].where)
    assert trained(tmp_path / "healthy", fault, healthy=True) == ([], [])
