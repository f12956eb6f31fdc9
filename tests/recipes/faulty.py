"""A recipe for tests that has a fault, if ``FAULT`` names one: digits by a small convolutional network.

``learning_rate``: a layer's steps are a thousand times as large; ``dead``: a block's ReLU never fires; ``labels``: a
tenth of the samples has the label of another class; ``slow``: rank 1 takes 80 ms more for each forward pass;
``starved``: a sample takes 2 ms to decode; ``drift``: rank 1 changes a weight by itself.
"""

import os
import time
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain import Batch, Config, Hook, Rule, Task, main, preset
from dltrain.config import Checkpoint, Data, Evaluation, Length, Logging, Optim, Run
from dltrain.metrics.classification import Classification

FAULT = os.environ.get("FAULT", "")
RANK = os.environ.get("RANK", "0")


@preset
def digits() -> Config:
    """Eight epochs."""
    return Config(
        run=Run(length=Length.parse("8ep")),
        data=Data(train="bundled://digits/train", evaluation="bundled://digits/heldout", global_batch_size=64),
        optim=Optim(learning_rate=3e-3),
        checkpoint=Checkpoint(every=Length.parse("8ep")),
        evaluation=Evaluation(metric="accuracy", mode="max", report=False),
        logging=Logging(tensorboard=False),
    )


def mislabelled(key: str) -> bool:
    """A tenth of the keys."""
    return zlib.crc32(key.encode()) % 10 == 0


class Leap(Hook):
    """A layer with a learning rate of its own: 999 times of what a step has changed is added to it."""

    def fit_start(self, trainer):
        self.weight = dict(trainer.engine.named_parameters())["second.0.weight"]

    def gradients_ready(self, trainer):
        self.before = self.weight.detach().clone()

    def step_end(self, trainer):
        with torch.no_grad():
            self.weight += 999 * (self.weight - self.before)


class Drift(Hook):
    """Rank 1 goes its own way after step 10."""

    def step_end(self, trainer):
        if trainer.step == 10 and RANK == "1":
            with torch.no_grad():
                next(iter(trainer.engine.named_parameters()))[1][0] += 0.01


@dataclass
class GreatLoss(Rule):
    """A rule of the recipe's own."""

    threshold: float = 10.0

    def update(self, seen):
        if seen.loss > self.threshold:
            yield self.finding(seen.step, f"the loss is {seen.loss:.3g}", loss=seen.loss)


class Block(nn.Sequential):
    def __init__(self, given: int, channels: int) -> None:
        super().__init__(nn.Conv2d(given, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(1, 16), Block(16, 32)
        self.head = nn.Linear(128, 10)
        if FAULT == "dead":
            nn.init.constant_(self.second[0].bias, -10.0)

    def forward(self, images: Tensor) -> Tensor:
        if FAULT == "slow" and RANK == "1" and self.training:
            time.sleep(0.08)
        return self.head(self.second(self.first(images)).flatten(1))


class Faulty(Task):
    def sample(self, sample, random):
        fields = super().sample(sample, random)
        if FAULT == "starved":
            time.sleep(0.002)
        if FAULT == "labels" and random is not None and mislabelled(sample.key):
            fields["cls"] = (fields["cls"] + 1 + zlib.crc32(sample.key.encode()) // 10 % 9) % 10
        return fields

    def model(self) -> nn.Module:
        return Net()

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["png"][:, None].float() / 127.5 - 1,)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["cls"], reduction="none")

    def metrics(self) -> Classification:
        return Classification(self.facts.get("classes") or [str(digit) for digit in range(10)])

    def rules(self):
        return [GreatLoss()] if FAULT == "learning_rate" else []

    def hooks(self):
        planted = {"drift": Drift, "learning_rate": Leap}
        return [planted[FAULT]()] if FAULT in planted else []


if __name__ == "__main__":
    main(Faulty)
