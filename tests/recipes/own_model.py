"""A recipe as a user writes it, with a model that the library has never seen: digits read row by row by gated layers.

The preset ``auto`` leaves the plan to ``Plan.auto``; ``planned`` has one of ten lines, which split layers need.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain import Batch, Config, Plan, Sample, Task, main, preset
from dltrain.config import Checkpoint, Data, Evaluation, Length, Logging, Model, Optim, Run, Schedule
from dltrain.data.decode import decode_field, decode_label
from dltrain.metrics.classification import Classification

PLAN = Plan(
    units=("blocks.*",),
    chain=("embed", "blocks.*", "head"),
    with_inputs=("head",),
    tensor={
        "blocks.*.gate": "column",
        "blocks.*.up": "column",
        "blocks.*.down": "row",
    },
)


class OwnModel(Model):
    width: int = 48
    """Of a row."""
    depth: int = 4
    """Gated blocks."""
    planned: bool = True
    """Whether the task has a plan."""


class OwnConfig(Config):
    model: OwnModel = OwnModel()


class GatedBlock(nn.Module):
    """Mixes the rows of an image, then each row: x + down(silu(gate(x)) * up(x))."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(rows, rows, kernel_size=3, padding=1)
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, rows: Tensor) -> Tensor:
        """[n, rows, width] to the same."""
        rows = rows + self.mix(rows)
        normed = self.norm(rows)
        return rows + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Embed(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.row = nn.Linear(size, width)
        self.place = nn.Parameter(0.1 * torch.randn(size, width))

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, rows, columns] to rows [n, rows, width]."""
        return self.row(images) + self.place


class Head(nn.Module):
    def __init__(self, size: int, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.columns = nn.Linear(size, width)
        self.out = nn.Linear(width, classes)

    def forward(self, rows: Tensor, images: Tensor) -> Tensor:
        """Rows [n, rows, width], and the images again, whose columns it looks at, to logits [n, classes]."""
        return self.out(F.gelu(self.norm(rows).mean(1) + self.columns(images.mean(1))))


class GatedNet(nn.Module):
    """The images skip all blocks, and with them the stages of a pipeline."""

    def __init__(self, width: int, depth: int, classes: int = 10, size: int = 8) -> None:
        super().__init__()
        self.embed = Embed(size, width)
        self.blocks = nn.ModuleList(GatedBlock(size, width) for _ in range(depth))
        self.head = Head(size, width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, rows, columns] to logits [n, classes]."""
        rows = self.embed(images)
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows, images)


class Digits(Task):
    config: OwnConfig

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, Any]:
        return {"image": decode_field(sample, "png"), "cls": decode_label(sample, 10)}

    def model(self) -> nn.Module:
        return GatedNet(self.config.model.width, self.config.model.depth)

    def plan(self) -> Plan | None:
        return PLAN if self.config.model.planned else None

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        return (batch.fields["image"].float() / 16 - 0.5,)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.fields["cls"], reduction="none")

    def metrics(self) -> Classification:
        return Classification([str(label) for label in range(10)])


@preset
def planned() -> OwnConfig:
    """Twelve passes over the digits."""
    return OwnConfig(
        run=Run(length=Length.parse("12ep")),
        data=Data(train="bundled://digits/train", evaluation="bundled://digits/heldout", global_batch_size=64),
        optim=Optim(learning_rate=3e-3, weight_decay=0.02, max_norm=1.0),
        schedule=Schedule(warmup=Length.parse("1ep")),
        checkpoint=Checkpoint(every=Length.parse("12ep")),
        evaluation=Evaluation(every=Length.parse("12ep"), metric="accuracy", mode="max", report=False),
        logging=Logging(every=Length.parse("10st"), tensorboard=False),
    )


@preset
def auto() -> OwnConfig:
    """The same without a plan."""
    return planned().model_copy(update={"model": OwnModel(planned=False)})


if __name__ == "__main__":
    main(Digits)
