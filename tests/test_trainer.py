"""The loop: hooks observe and ask, and requests are acted on a fixed number of steps later."""

from __future__ import annotations

import time
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
from dltrain.hooks.base import EVENTS, Hook, Request
from dltrain.mesh import build_mesh
from dltrain.metrics.classification import Classification
from dltrain.parallel.apply import parallelize
from dltrain.runtime.environment import Environment
from dltrain.task import Task
from dltrain.trainer import LAG, Trainer


class Parity(Task):
    """Learns whether a number is odd from its bits."""

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        number = int(decode_fields(sample)["cls"])
        bits = np.array([number >> place & 1 for place in range(6)], dtype=np.float32)
        return {"bits": bits, "cls": np.int64(number % 2)}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["bits"],)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["cls"], reduction="none")

    def metrics(self) -> Classification:
        return Classification(["even", "odd"])


class Log(Hook):
    """Every event in order, with what came along."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []


for _event in EVENTS:

    def _note(self: Log, trainer: Any, *details: Any, event: str = _event) -> None:
        self.events.append((event, (trainer.step, *details)))

    setattr(Log, _event, _note)


@pytest.fixture
def url(tmp_path: Path) -> str:
    with ShardWriter(str(tmp_path / "data"), samples_per_shard=16) as writer:
        for number in range(64):
            writer.write(f"n{number}", {"cls": str(number).encode()})
    return str(tmp_path / "data")


def trainer(url: str, *hooks: Hook, evaluate: bool = True, **overrides: Any) -> Trainer:
    settings = {"run.length": "8st", "logging.every": "1st", "optim.learning_rate": "0.05", "evaluation.every": "4st"}
    config = load_overrides(Config(), {**settings, **{k.replace("__", "."): v for k, v in overrides.items()}})
    dataset, task = open_dataset(url), Parity(config)
    environment, device = Environment(), torch.device("cpu")
    engine = parallelize(task, config, build_mesh(config.parallel, environment, device), device)
    order = Order(dataset.shard_sizes, config.run.seed)
    loader = Loader(dataset, order, task.sample, global_batch_size=16, augment=True, tail=config.data.tail)
    held_out = Loader(dataset, order, task.sample, global_batch_size=24, tail="pad", epochs=1)
    return Trainer(config, task, engine, loader, evaluation=held_out if evaluate else None, hooks=hooks)


def test_it_learns_and_tells_hooks_what_happens(url: str) -> None:
    log = Log()
    trained = trainer(url, log, run__length="160st", evaluation__every="80st")
    assert trained.fit() == "finished"
    assert trained.scores["accuracy"] == 1.0
    assert trained.scores["samples"] == 64
    names = [name for name, _ in log.events]
    assert (names[0], names[-1]) == ("fit_start", "fit_end")
    assert names[1:4] == ["step_start", "gradients_ready", "step_end"]
    records = [details[1] for name, details in log.events if name == "logged"]
    assert [record["step"] for record in records] == list(range(1, 161))
    assert records[0]["loss"] > 10 * records[-1]["loss"]
    evaluations = [details[1]["step"] for name, details in log.events if name == "evaluation_end"]
    assert evaluations == [80, 160]


@pytest.mark.parametrize(
    ("length", "tail", "steps"),
    [("2ep", "carry", 8), ("1.5ep", "carry", 6), ("7st", "carry", 7), ("2ep", "drop", 8), ("2ep", "pad", 8)],
)
def test_the_length_of_a_run(url: str, length: str, tail: str, steps: int) -> None:
    trained = trainer(url, run__length=length, data__tail=tail)
    trained.fit()
    assert (trained.step, trained.total_steps) == (steps, steps)


class Ask(Hook):
    def __init__(self, at: int, request: Request) -> None:
        self.at, self.request = at, request

    def step_end(self, trainer: Any) -> Request | None:
        return self.request if trainer.step == self.at else None


def test_requests_are_acted_on_a_fixed_number_of_steps_later(url: str) -> None:
    log = Log()
    stopped = trainer(url, Ask(2, Request.STOP), log, run__length="20st", evaluation__every="0st")
    assert stopped.fit() == "stopped"
    assert stopped.step == 2 + 1 + LAG  # asked after step 2, carried by step 3
    assert [name for name, _ in log.events if name == "stop_requested"]
    finished = trainer(url, Ask(2, Request.FINISH), run__length="20st")
    assert (finished.fit(), finished.step) == ("finished", 2 + 1 + LAG)
    log = Log()
    trainer(url, Ask(2, Request.EVALUATE), log, evaluation__every="0st").fit()
    assert [d[0] for name, d in log.events if name == "evaluation_end"] == [2 + 1 + LAG, 8]


def test_a_request_is_not_lost_to_an_evaluation_in_between(url: str) -> None:
    stopped = trainer(url, Ask(3, Request.STOP), run__length="20st", evaluation__every="1st")
    assert stopped.fit() == "stopped"
    assert stopped.step <= 3 + 1 + LAG


def test_hours_are_agreed_on_by_request(url: str) -> None:
    began = time.monotonic()
    trained = trainer(url, run__length="0.0003h", schedule__name="constant", evaluate=False)
    assert trained.fit() == "finished"
    assert 1.0 < time.monotonic() - began < 20
    assert trained.step > 10


def test_records_are_complete_without_evaluation(url: str) -> None:
    log = Log()
    trainer(url, log, evaluate=False, run__length="5st").fit()
    assert [d[1]["step"] for name, d in log.events if name == "logged"] == [1, 2, 3, 4, 5]


def test_intervals_in_hours_are_kept(url: str) -> None:
    log = Log()
    settings = {"run__length": "0.0006h", "schedule__name": "constant", "evaluation__every": "0.0002h"}
    trainer(url, log, **settings).fit()  # 2.16 s with evaluations every 0.72 s, and one at the end
    assert 3 <= sum(name == "evaluation_end" for name, _ in log.events) <= 4


class Poison(Hook):
    """Makes a weight's gradient not a number in one step."""

    def gradients_ready(self, trainer: Any) -> None:
        if trainer.step == 3:
            next(iter(trainer.engine.model.parameters())).grad[0, 0] = float("nan")


def test_a_gradient_that_is_not_finite_stops_or_is_skipped(url: str) -> None:
    with pytest.raises(ValueError, match=r"gradient of step 4 is not finite .*norm nan.*run\.nonfinite skip"):
        trainer(url, Poison()).fit()
    skipped = trainer(url, Poison(), run__nonfinite="skip")
    assert skipped.fit() == "finished"
    assert all(bool(weight.isfinite().all()) for _, weight in skipped.engine.named_parameters())


def test_an_unknown_metric_names_those_there_are(url: str) -> None:
    with pytest.raises(ValueError, match=r"evaluation.metric is 'f11', which is not scored; did you mean 'f1'"):
        trainer(url, evaluation__metric="f11")


def test_seeds_decide_everything(url: str) -> None:
    def losses(seed: str) -> list[float]:
        log = Log()
        trainer(url, log, run__seed=seed).fit()
        return [d[1]["loss"] for name, d in log.events if name == "logged"]

    assert losses("1") == losses("1") != losses("2")


def test_random_state_is_a_function_of_the_step_and_of_nothing_drawn_before(url: str) -> None:
    class Noise(Hook):
        def step_end(self, trainer: Any) -> None:
            torch.rand(trainer.step)

    def weights(*hooks: Hook) -> list[Tensor]:
        trained = trainer(url, *hooks)
        trained.fit()
        return [weight.detach() for _, weight in trained.engine.named_parameters()]

    for one, other in zip(weights(), weights(Noise()), strict=True):
        assert torch.equal(one, other)
