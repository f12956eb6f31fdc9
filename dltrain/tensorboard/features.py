"""The projector: what enters the model's last linear layer, of held-out samples, with their labels and images.

features = Features()
features.watch(model)
features.begin()  # then the evaluation runs, and tells of each batch
features.add(batch, {"label": ["cat", "dog"], "key": batch.keys})
files = features.files(step)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dltrain.config import Config
from dltrain.data.batch import Batch
from dltrain.tensorboard.images import as_pixels, sprites

SAMPLES = 1000
"""At most."""

_NUMBERS = 1_000_000
"""Of all samples together, at most: they are written as text, and read by a browser."""

_SIDE = 32
"""Pixels of an image in the projector."""

_FOLDER = "projector"


def has_features(config: Config) -> bool:
    """Whether the last layer is called with whole samples: not where ranks share layers, tokens or the chain of layers,
    nor where the model is compiled, which calls hooks never or in pieces of its own."""
    return config.parallel.tp * config.parallel.cp * config.parallel.pp == 1 and not config.precision.compile


class Features:
    """Of one rank's first samples of an evaluation."""

    def __init__(self) -> None:
        self.on = False
        self._given: list[Tensor] = []
        self._wanted = SAMPLES
        self._rows: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._about: list[tuple[str, ...]] = []
        self._images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def watch(self, model: nn.Module) -> None:
        """Give the last linear layer a hook; a model without one has no features."""
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if layers:
            layers[-1].register_forward_pre_hook(self._note)

    def begin(self) -> None:
        """Forget the last evaluation's, and look at this one's."""
        self.on, self._wanted = True, SAMPLES
        self._given, self._rows, self._about, self._images = [], [], [], []

    def add(self, batch: Batch, columns: Mapping[str, Sequence[str]]) -> None:
        """What was noted belongs to these samples, of which ``columns`` tell. Nothing is taken of a layer that is not
        called once for each."""
        given, self._given = self._given, []
        if not self.on or sum(map(len, given)) != len(batch):
            self.on = False
            return
        rows = torch.cat(given)
        self._wanted = min(self._wanted, _NUMBERS // max(1, rows.shape[1]))
        taken = (batch.position >= 0).nonzero()[:, 0].tolist()[: self._wanted - len(self._about)]
        self._names = tuple(columns)
        self._rows.append(rows[taken].float().cpu())
        self._about += [tuple(column[place] for column in columns.values()) for place in taken]
        self._add_images(batch, taken)
        self.on = len(self._about) < self._wanted

    def _add_images(self, batch: Batch, taken: list[int]) -> None:
        for values in batch.fields.values():
            pixels = as_pixels(values[taken].cpu()) if taken else None
            if pixels is not None:
                self._images.append(pixels)
                return

    def files(self, step: int) -> dict[str, bytes]:
        """What the projector reads, by path; nothing where there are no features."""
        if not self._about:
            return {}
        config = ProjectorConfig()
        shown = config.embeddings.add()
        shown.tensor_name = f"features at step {step}"
        shown.tensor_path, shown.metadata_path = f"{_FOLDER}/features.tsv", f"{_FOLDER}/samples.tsv"
        files = {
            shown.tensor_path: _numbers(torch.cat(self._rows)),
            shown.metadata_path: _table([self._names, *self._about]),
        }
        if sum(map(len, self._images)) == len(self._about):
            shown.sprite.image_path = f"{_FOLDER}/images.png"
            shown.sprite.single_image_dim.extend([_SIDE, _SIDE])
            file = io.BytesIO()
            sprites(np.concatenate(self._images), _SIDE).save(file, format="PNG")
            files[shown.sprite.image_path] = file.getvalue()
        return {**files, "projector_config.pbtxt": text_format.MessageToString(config).encode()}

    def _note(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if not self.on or module.training or not given:
            return
        value = given[0]
        if isinstance(value, DTensor) or value.dim() < 2:
            self.on = False
            return
        # of tokens or channels the mean: one row for each sample
        self._given.append(value.detach() if value.dim() == 2 else value.detach().flatten(1, -2).mean(1))


def _numbers(rows: Tensor) -> bytes:
    file = io.BytesIO()
    np.savetxt(file, rows.numpy(), fmt="%.5g", delimiter="\t")
    return file.getvalue()


def _table(rows: Sequence[tuple[str, ...]]) -> bytes:
    return "".join("\t".join(each.replace("\t", " ") for each in row) + "\n" for row in rows).encode()
