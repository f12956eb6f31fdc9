"""Image classification: one image, one class.

    dltrain train image/classify --preset digits --nproc 2
    torchrun --nproc-per-node 2 recipes/image/classify.py --preset digits

Shards hold an image (`png`, `jpg`) and its class (`cls`) per sample; the manifest's fact `classes` names the classes.
Copy this file (`dltrain recipe cp image/classify mine.py`) and change what you like: it is yours then.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dltrain import Batch, Config, Plan, Sample, Task, UserError, main, preset
from dltrain.config import Data, Evaluation, Length, Logging, Model, Optim, Run, Schedule
from dltrain.data.decode import decode_field, decode_label, encode_crop
from dltrain.metrics.classification import Classification
from dltrain.models.vision import convnext, resnet, small_cnn, vit


class ClassifyModel(Model):
    """The network, and what its images look like."""

    name: Literal["small_cnn", "vit", "resnet18", "resnet50", "convnext_tiny"] = "small_cnn"
    """A small convolutional network, a vision transformer, or torchvision's of that name (grey images are repeated)."""
    image: str = "png"
    """Field of the image in the shards."""
    size: int = Field(default=8, ge=4)
    """Height and width of the images, in pixels."""
    crop: bool = False
    """Cut a random piece of each image, in evaluation its middle, and scale it to `size`: for images of any size."""
    channels: int = Field(default=1, ge=1)
    """1 for grey images, 3 for colour."""
    classes: int = Field(default=10, ge=2)
    """Number of classes; labels run from 0."""
    width: int = Field(default=32, gt=0)
    """small_cnn: channels of the first block; vit: width of a token."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """small_cnn: dropout before the last layer; vit: in every block; convnext: of whole blocks (stochastic depth)."""
    patch: int = Field(default=2, gt=0)
    """vit: height and width of a patch, in pixels; it divides the size."""
    depth: int = Field(default=4, gt=0)
    """vit: blocks."""
    heads: int = Field(default=4, gt=0)
    """vit: heads of attention; they divide the width."""
    registers: int = Field(default=0, ge=0)
    """vit: register tokens."""
    positions: float = Field(default=0.02, gt=0)
    """vit: deviation of the position embeddings at the start; few images want more."""
    shift: int = Field(default=1, ge=0)
    """Augmentation: shift each training image by up to so many pixels."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all classes (Szegedy et al. 2016)."""

    @model_validator(mode="after")
    def _fits(self) -> "ClassifyModel":
        if self.name == "vit" and self.size % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not divide a size of {self.size}")
        if self.name == "vit" and self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if self.name == "convnext_tiny" and self.size < 32:
            raise ValueError(f"convnext_tiny halves images five times; a size of {self.size} pixels is less than 32")
        if self.crop and self.channels != 3:
            raise ValueError("pieces cut from images are in colour; set model.channels 3")
        return self


class ClassifyConfig(Config):
    model: ClassifyModel = ClassifyModel()


@preset
def digits() -> ClassifyConfig:
    """1,797 scans of handwritten digits, 8x8; about 0.99 on the 360 held out, in half a minute on two cores."""
    return ClassifyConfig(
        run=Run(length=Length.parse("30ep")),
        data=Data(train="bundled://digits/train", evaluation="bundled://digits/heldout", global_batch_size=64),
        optim=Optim(learning_rate=4e-3, weight_decay=0.02, max_norm=1.0),
        schedule=Schedule(warmup=Length.parse("1ep")),
        evaluation=Evaluation(every=Length.parse("4ep"), metric="accuracy", mode="max"),
        logging=Logging(every=Length.parse("10st")),
    )


@preset
def vit_tiny() -> ClassifyConfig:
    """The same digits by a vision transformer of four blocks, for trying layouts: 0.97 on one seed."""
    config = digits()
    model = ClassifyModel(name="vit", width=64, dropout=0.1, positions=0.5)
    optim = Optim(learning_rate=2e-3, weight_decay=0.05, max_norm=1.0)
    return config.model_copy(update={"model": model, "optim": optim})


class Classify(Task):
    """Cross-entropy over class logits."""

    config: ClassifyConfig

    def sample(self, sample: Sample, random: np.random.Generator | None) -> dict[str, Any]:
        model = self.config.model
        label = decode_label(sample, model.classes)
        if model.crop:
            return {"image": encode_crop(sample, model.image, model.size, random), "cls": label}
        image = self._sized(decode_field(sample, model.image), sample.where)
        if random is not None and model.shift:
            image = shifted(image, *random.integers(-model.shift, model.shift + 1, size=2))
        return {"image": image, "cls": label}

    def _sized(self, image: np.ndarray, where: str) -> np.ndarray:
        model = self.config.model
        if image.shape[:2] != (model.size, model.size):
            pixels = "x".join(map(str, image.shape[:2]))
            raise UserError(
                f"{where} has an image of {pixels} pixels, and model.size is {model.size}; give its size, or "
                "model.crop true"
            )
        channels = image.shape[2] if image.ndim == 3 else 1
        if model.name in ("small_cnn", "vit") and channels != model.channels:
            raise UserError(f"{where} has an image of {channels} channels; give model.channels {channels}")
        return image

    def model(self) -> nn.Module:
        model = self.config.model
        if model.name == "small_cnn":
            return small_cnn.SmallCNN(model.channels, model.size, model.classes, model.width, model.dropout)
        if model.name in ("resnet18", "resnet50"):
            return resnet.resnet(model.name, model.classes)
        if model.name == "convnext_tiny":
            return convnext.convnext(model.name, model.classes, model.dropout)
        return vit.ViT(
            model.size,
            model.patch,
            model.channels,
            model.classes,
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            registers=model.registers,
            dropout=model.dropout,
            positions=model.positions,
        )

    def plan(self) -> Plan:
        plans = {"small_cnn": small_cnn.PLAN, "vit": vit.PLAN, "convnext_tiny": convnext.PLAN}
        return plans.get(self.config.model.name, resnet.PLAN)

    def inputs(self, batch: Batch) -> tuple[Tensor]:
        images = batch.fields["image"].float() / 255 - 0.5
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        in_colour = self.config.model.name in ("resnet18", "resnet50", "convnext_tiny")
        return (images.expand(-1, 3, -1, -1) if in_colour and images.shape[1] == 1 else images,)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        smoothing = self.config.model.label_smoothing
        return F.cross_entropy(outputs, batch.fields["cls"], reduction="none", label_smoothing=smoothing)

    def metrics(self) -> Classification:
        names = self.facts.get("classes", range(self.config.model.classes))
        return Classification([str(name) for name in names], image="image")


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image moved by so many pixels, its edge repeated."""
    rows = np.clip(np.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
    columns = np.clip(np.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
    return image[rows[:, None], columns]


if __name__ == "__main__":
    main(Classify)
