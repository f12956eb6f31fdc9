"""A recipe for tests: digits by a small network with dropout and batch norm; it can be told to die, and notes its keys.

Variables: ``TINY_TRACE`` names a folder for the keys each rank saw; ``TINY_DIE`` is ``step:signal``; ``TINY_NAN`` is a
step whose losses are not finite; ``TINY_RAISE`` is ``step:rank:message`` of an error; ``TINY_PAUSE`` is how many
seconds a step takes at least; ``TINY_STOP`` is a file that is made when an evaluation begins.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain import Batch, Config, Hook, Task, main, preset
from dltrain.config import Checkpoint, Data, Evaluation, Length, Logging, Model, Optim, Run, Schedule
from dltrain.metrics.classification import Classification


class TinyModel(Model):
    width: int = 16
    """Hidden units."""


class TinyConfig(Config):
    model: TinyModel = TinyModel()


@preset
def small() -> TinyConfig:
    """Sixteen steps."""
    return TinyConfig(
        run=Run(length=Length.parse("16st")),
        data=Data(train="bundled://digits/train", evaluation="bundled://digits/heldout", global_batch_size=100),
        optim=Optim(learning_rate=5e-3, max_norm=1.0),
        schedule=Schedule(warmup=Length.parse("4st")),
        checkpoint=Checkpoint(every=Length.parse("4st")),
        evaluation=Evaluation(every=Length.parse("8st"), metric="accuracy", mode="max", report=False),
        logging=Logging(every=Length.parse("1st"), tensorboard=False),
    )


class Trace(Hook):
    """Writes the keys of every step, and dies when told to."""

    def step_start(self, trainer, batch):
        folder = os.environ.get("TINY_TRACE")
        if folder:
            real = [
                [p, k] for p, k, w in zip(batch.position.tolist(), batch.keys, batch.weight.tolist(), strict=True) if w
            ]
            path = Path(folder) / f"{os.environ.get('RANK', '0')}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps({"step": trainer.step, "samples": real}) + "\n")

    def evaluation_start(self, trainer):
        if os.environ.get("TINY_STOP"):
            Path(os.environ["TINY_STOP"]).touch()

    def step_end(self, trainer):
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
        at, rank, message = os.environ.get("TINY_RAISE", "0:0:").split(":", 2)
        if int(at) and trainer.step == int(at) and os.environ.get("RANK", "0") == rank:
            raise RuntimeError(message)
        step, _, number = os.environ.get("TINY_DIE", "0:").partition(":")
        if int(step) and trainer.step == int(step) and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.Signals[number])


class Tiny(Task):
    config: TinyConfig

    def model(self) -> nn.Module:
        width = self.config.model.width
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10)
        )

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        if os.environ.get("TINY_STOP") and not torch.is_grad_enabled():
            time.sleep(0.01)  # an evaluation of some seconds
        return (batch.fields["png"].float() / 255,)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(outputs, batch.fields["cls"], reduction="none")
        if torch.is_grad_enabled() and os.environ.get("TINY_NAN"):
            losses = losses * float("nan")
        return losses

    def metrics(self) -> Classification:
        return Classification([str(label) for label in range(10)])

    def hooks(self) -> list[Hook]:
        return [Trace()]


if __name__ == "__main__":
    main(Tiny)
