"""TensorBoard: scalars, the config as text, a batch and the worst mistakes as images, hyperparameters with scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dltrain.config import to_yaml
from dltrain.data.batch import Batch
from dltrain.hooks.base import Hook, View

_SHOWN = 16


class TensorBoard(Hook):
    """Writes events into ``folder``; rank 0 alone has this hook."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._scores: dict[str, float] = {}
        self._batch_shown = False

    def fit_start(self, trainer: View) -> None:
        # events of steps that will be done again are hidden by TensorBoard itself
        self._writer = SummaryWriter(str(self._folder), purge_step=trainer.step + 1 if trainer.step else None)
        self._writer.add_text("config", f"```yaml\n{to_yaml(trainer.config)}\n```", trainer.step)

    def step_start(self, trainer: View, batch: Batch) -> None:
        if self._batch_shown or self._writer is None:
            return
        self._batch_shown = True
        for name, images in batch.fields.items():
            if images.dtype == torch.uint8 and images.dim() in (3, 4):
                self._writer.add_images(f"batch/{name}", _as_nchw(images[:_SHOWN]), trainer.step)

    def logged(self, trainer: View, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and self._writer is not None:
                self._writer.add_scalar(f"train/{name}", value, record["step"])

    def evaluation_end(self, trainer: View, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name.startswith("evaluation/") and self._writer is not None:
                self._writer.add_scalar(name, value, trainer.step)
                self._scores[name] = value

    def fit_end(self, trainer: View) -> None:
        if self._writer is None:
            return
        flat = _flatten(trainer.config.model_dump(mode="json"))
        scores = {f"hparam/{name}": value for name, value in self._scores.items()}
        for summary in hparams(flat, scores):  # type: ignore[no-untyped-call]
            self._writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        for name, value in self._scores.items():
            self._writer.add_scalar(f"hparam/{name}", value, trainer.step)

    def pictures(self, step: int, pictures: list[tuple[str, Path]]) -> None:
        """Add the pictures of a report."""
        import numpy as np
        from PIL import Image

        for title, path in pictures:
            if self._writer is not None:
                image = np.asarray(Image.open(path).convert("RGB"))
                self._writer.add_image(f"report/{title}", image, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _as_nchw(images: torch.Tensor) -> torch.Tensor:
    """Grey [n, h, w] or colour [n, h, w, 3], uint8, as [n, c, h, w]."""
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
