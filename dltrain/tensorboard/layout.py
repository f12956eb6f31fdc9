"""Where a number stands: its tag, whose first word is its group, and charts that show what belongs together.

tag_of("grad_norm")  # optimizer/gradient_norm
"""

from __future__ import annotations

from collections.abc import Sequence

from dltrain.config import Config

_TAGS = {
    "loss": "loss/train",
    "evaluation/loss": "loss/evaluation",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "loss_scale": "optimizer/loss_scale",
    "epoch": "progress/epoch",
    "samples_per_second": "speed/samples_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait": "speed/data_wait",
    "tflops": "speed/tflops",
    "mfu": "speed/model_flops_utilisation",
}

_TOGETHER = ("accuracy", "balanced_accuracy", "f1", "accuracy_top5")
"""Scores between 0 and 1 that are best seen beside each other."""

_NAIVE = "naive_"
"""Begins the name of a score of the naive forecast."""

_TENSORS = {
    "gradients": ("Gradients: mean absolute value", "tensors_gradients_abs_mean/.*"),
    "updates": ("Updates beside weights", "tensors_update_ratio/.*"),
    "weights": ("Weights: norm", "tensors_weights_l2/.*"),
    "activations": ("Activations: deviation", "tensors_activations_std/.*"),
}

Charts = dict[str, list[object]]


def tag_of(name: str) -> str:
    """Of a number by its name in ``metrics.jsonl``."""
    return _TAGS.get(name, name if "/" in name else f"train/{name}")


def layout_of(config: Config, scores: Sequence[str]) -> dict[str, Charts]:
    """Charts of several lines by title and section, as ``add_custom_scalars`` takes them; ``scores`` by their names."""
    wanted = {
        "Loss": {"Training and held-out loss": ["loss/train", "loss/evaluation"]},
        "Scores": _of_scores(scores),
        "Optimization": {
            "Learning rate": ["optimizer/learning_rate"],
            "Gradient norm before clipping": ["optimizer/gradient_norm"],
        },
        "Speed": {
            "Samples per second": ["speed/samples_per_second"],
            "Share of time spent waiting for data": ["speed/data_wait"],
            "Milliseconds of reading and decoding a sample": ["data/read_ms", "data/decode_ms"],
        },
        "Tensors by layer": _of_tensors(config),
    }
    return {
        section: {title: ["Multiline", tags] for title, tags in charts.items()}
        for section, charts in wanted.items()
        if charts
    }


def _of_scores(scores: Sequence[str]) -> dict[str, list[str]]:
    together = [name for name in _TOGETHER if name in scores]
    charts = {"Share of samples": [f"evaluation/{name}" for name in together]} if len(together) > 1 else {}
    for name in scores:
        if name not in (*together, "loss", "samples") and not name.startswith(_NAIVE):
            naive = [_NAIVE + name] if _NAIVE + name in scores else []
            title = f"{name} beside the naive forecast" if naive else name.replace("_", " ")
            charts[title] = [f"evaluation/{each}" for each in (name, *naive)]
    return charts


def _of_tensors(config: Config) -> dict[str, list[str]]:
    if not config.debugger.on:
        return {}
    collected = config.debugger.collect
    return {title: [tags] for kind, (title, tags) in _TENSORS.items() if kind in collected or "all" in collected}
