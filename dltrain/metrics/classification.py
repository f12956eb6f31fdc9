"""Classification: accuracy and everything else that follows from a confusion matrix, calibration, worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain.data.batch import Batch
from dltrain.metrics.base import Scores, worst

BINS = 15
KEPT = 16

THRESHOLDS = 127
"""Of curves of precision and recall: as many as TensorBoard takes."""

CURVES = 50
"""Most classes that have a curve each."""


class Classification:
    """Scores of logits [n, classes] against ``batch.fields[target]`` (integers [n]).

    ``accuracy``; ``accuracy_top5`` with more than five classes; ``balanced_accuracy`` (mean recall); ``f1`` (macro);
    ``calibration_error`` (expected, 15 equal bins; Guo et al. 2017); ``loss``; ``samples``.
    """

    def __init__(self, names: Sequence[str], target: str = "cls", image: str | None = None) -> None:
        self.names = list(names)
        self._target, self._image = target, image
        classes = len(self.names)
        self.sums: dict[str, Tensor] = {
            "confusion": torch.zeros(classes, classes, dtype=torch.float64),
            "top5": torch.zeros(1, dtype=torch.float64),
            "loss": torch.zeros(1, dtype=torch.float64),
            "bins": torch.zeros(3, BINS, dtype=torch.float64),  # samples, confidence, right
            "curves": torch.zeros(2, classes if classes <= CURVES else 1, THRESHOLDS, dtype=torch.float64),
        }
        self._worst: list[dict[str, Any]] = []

    def update(self, outputs: Tensor, losses: Tensor, batch: Batch) -> None:
        kept = batch.position >= 0
        logits, losses = outputs.detach().float().cpu()[kept], losses.detach().double().cpu()[kept]
        target = batch.fields[self._target].cpu()[kept]
        probabilities = logits.softmax(1)
        confidence, predicted = probabilities.max(1)
        classes = len(self.names)
        pairs = torch.bincount(target * classes + predicted, minlength=classes**2)
        self.sums["confusion"] += pairs.reshape(classes, classes)
        self.sums["loss"] += losses.sum()
        top = logits.topk(min(5, classes), dim=1).indices
        self.sums["top5"] += (top == target[:, None]).any(1).sum()
        self._count_bins(confidence.double(), (predicted == target).double())
        self._count_thresholds(probabilities, target)
        self._keep_worst(losses, predicted, target, confidence, batch, kept)

    def compute(self) -> Scores:
        confusion, bins = self.sums["confusion"], self.sums["bins"]
        total, right = confusion.sum(), confusion.diagonal()
        recall = right / confusion.sum(1).clamp(min=1)
        seen = confusion.sum(1) > 0
        f1 = 2 * right / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)
        scores = {
            "accuracy": right.sum() / total.clamp(min=1),
            "balanced_accuracy": recall[seen].mean(),
            "f1": f1[seen].mean(),
            "calibration_error": (bins[1] - bins[2]).abs().sum() / total.clamp(min=1),
            "loss": self.sums["loss"][0] / total.clamp(min=1),
            "samples": total,
        }
        if len(self.names) > 5:
            scores["accuracy_top5"] = self.sums["top5"][0] / total.clamp(min=1)
        return {name: float(value) for name, value in scores.items()}

    def curves(self) -> dict[str, Tensor]:
        """Of each class, if there are at most :data:`CURVES`, and of all together: a sample counts for each."""
        counts = self.sums["curves"]
        each = dict(zip(self.names, counts.unbind(1), strict=True)) if counts.shape[1] == len(self.names) else {}
        return {"all classes": counts.sum(1), **each}

    def examples(self) -> list[dict[str, Any]]:
        return self._worst

    def report(self, folder: Path, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
        from dltrain.metrics.plots import confusion_matrix, image_grid, reliability

        confusion = self.sums["confusion"]
        pictures = [
            ("Confusion matrix", confusion_matrix(confusion, self.names, folder / "confusion_matrix.png")),
            ("Reliability", reliability(self.sums["bins"], folder / "reliability.png")),
        ]
        mistakes = [example for example in examples if example["predicted"] != example["target"]]
        shown = [example for example in mistakes if "image" in example]
        if shown:
            captions = [f"{e['key']}: {e['target']} as {e['predicted']}" for e in shown]
            images = [e["image"] for e in shown]
            pictures.append(("Worst mistakes", image_grid(images, captions, folder / "mistakes.png")))
        details = {
            "confusion": confusion.long().tolist(),
            "classes": {
                name: {
                    "samples": int(confusion[place].sum()),
                    "recall": float(confusion[place, place] / confusion[place].sum().clamp(min=1)),
                    "precision": float(confusion[place, place] / confusion[:, place].sum().clamp(min=1)),
                }
                for place, name in enumerate(self.names)
            },
            "mistakes": [{k: v for k, v in example.items() if k != "image"} for example in mistakes],
        }
        return details, pictures

    def _count_bins(self, confidence: Tensor, right: Tensor) -> None:
        place = (confidence.nan_to_num() * BINS).long().clamp(max=BINS - 1)  # a model that diverged is scored, too
        for row, values in enumerate((torch.ones_like(confidence), confidence, right)):
            self.sums["bins"][row].index_add_(0, place, values)

    def _count_thresholds(self, probabilities: Tensor, target: Tensor) -> None:
        """Samples by the probability of each class: those that are of it, and the others."""
        counts = self.sums["curves"]
        rows, size = counts.shape[1], counts[0].numel()
        places = (probabilities.nan_to_num() * (THRESHOLDS - 1)).long()
        if rows > 1:
            places += torch.arange(rows) * THRESHOLDS
        right = torch.bincount(places.gather(1, target[:, None])[:, 0], minlength=size)
        counts[0] += right.reshape(rows, THRESHOLDS)
        counts[1] += (torch.bincount(places.reshape(-1), minlength=size) - right).reshape(rows, THRESHOLDS)

    def _keep_worst(
        self, losses: Tensor, predicted: Tensor, target: Tensor, confidence: Tensor, batch: Batch, kept: Tensor
    ) -> None:
        rows = kept.nonzero()[:, 0].tolist()
        candidates = list(self._worst)
        for place in losses.topk(min(KEPT, len(rows))).indices.tolist():
            example = {
                "key": batch.keys[rows[place]],
                "loss": float(losses[place]),
                "target": self.names[int(target[place])],
                "predicted": self.names[int(predicted[place])],
                "confidence": float(confidence[place]),
            }
            if self._image is not None:
                example["image"] = batch.fields[self._image][rows[place]].cpu().tolist()
            candidates.append(example)
        self._worst = worst(candidates, KEPT)
