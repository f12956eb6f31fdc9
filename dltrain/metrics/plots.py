"""Pictures of an evaluation. matplotlib draws without a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def confusion_matrix(confusion: Tensor, names: Sequence[str], path: Path) -> Path:
    """Counts by true (rows) and predicted (columns) class, coloured by the row's share."""
    counts = confusion.numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.0, min(12.0, 0.45 * len(names) + 2))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return _save(figure, path)


def reliability(bins: Tensor, path: Path) -> Path:
    """Accuracy against confidence: on the diagonal, the model is as right as it says."""
    samples, confidence, right = bins.numpy()
    used = samples > 0
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.plot(confidence[used] / samples[used], right[used] / samples[used], "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    return _save(figure, path)


def image_grid(images: Sequence[Any], captions: Sequence[str], path: Path) -> Path:
    """Images, uint8 [height, width] or [height, width, 3], with a caption each."""
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(np.asarray(image, dtype=np.uint8), cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=8)
    return _save(figure, path)


def horizon_errors(errors: dict[str, list[float]], path: Path) -> Path:
    """MASE by step ahead, a line each for the model and the naive forecast."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, values in errors.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="steps ahead", ylabel="MASE", ylim=(0, None))
    axes.legend()
    return _save(figure, path)


def forecasts(examples: Sequence[dict[str, Any]], path: Path) -> Path:
    """Past, truth, forecast and seasonal naive forecast of each example."""
    figure, axes = plt.subplots(len(examples), 1, figsize=(8, 2 * len(examples)), layout="constrained", squeeze=False)
    for axis, example in zip(axes[:, 0], examples, strict=True):
        past, ahead = len(example["past"]), len(example["future"])
        axis.plot(range(-past, 0), example["past"], color="grey", linewidth=1)
        lines = (("future", "k-", "truth"), ("forecast", "C0-", "forecast"), ("naive", "C1--", "seasonal naive"))
        for name, style, label in lines:
            axis.plot(range(ahead), example[name], style, linewidth=1.2, label=label)
        axis.set_title(f"{example['key']}: mean error {example['loss']:.3g}", fontsize=8)
    axes[0, 0].legend(fontsize=7, ncols=3)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
