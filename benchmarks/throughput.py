"""Training images per second of torchvision's ResNet-18 and ViT-B/16, random weights: the Trainer against a bare loop.

Both clip the gradient norm at 1, so that both compute it. On a GPU both run in bf16 autocast, compiled, channels last,
on images of 224 pixels; on a CPU in fp32 as they are, on images of 64 pixels.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.bare import BareLoop
from benchmarks.case import Case, random_batch, scaled
from benchmarks.ours import OurLoop, config_of
from benchmarks.result import Request, device_kind, spread, steady, store
from benchmarks.rounds import interleave, warm_up
from dltrain.config import Config, Run
from dltrain.models.vision.torchvision import torchvision_model
from dltrain.runtime.environment import Environment
from dltrain.runtime.process_group import joined

CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """How much of one model is measured: pixels of a side, samples of a batch, steps of a round, rounds."""

    pixels: int
    batch: int
    steps: int
    rounds: int


SIZES = {
    ("cpu", True): {"resnet18": Size(64, 16, 5, 12), "vit_b_16": Size(64, 8, 1, 12)},
    ("cpu", False): {"resnet18": Size(64, 32, 10, 16), "vit_b_16": Size(64, 16, 3, 16)},
    ("cuda", True): {"resnet18": Size(224, 256, 20, 6), "vit_b_16": Size(224, 128, 10, 6)},
    ("cuda", False): {"resnet18": Size(224, 256, 60, 12), "vit_b_16": Size(224, 128, 40, 12)},
}
"""By device and whether it is quick."""

WARM_UP = 3
"""Steps of each loop before the rounds: compilation, the allocator, the optimizer's state."""


def run(request: Request) -> dict[str, Any]:
    """Measure both models and store the result; returns the line that sums it up."""
    with joined(Config(run=Run(device=request.device)), Environment()) as device:
        sizes = SIZES[device.type, request.quick]
        models = {name: measure(name, size, device) for name, size in sizes.items()}
        settings = {"threads": torch.get_num_threads(), **_settings(device)}
        path = store(request, device, settings, {"models": models})
    summary = {name: _summary(measured) for name, measured in models.items()}
    ratio = min(measured["ratio"] for measured in models.values())
    return {"benchmark": request.name, "device": device_kind(device), **summary, "ratio": ratio, "result": path}


def measure(name: str, size: Size, device: torch.device) -> dict[str, Any]:
    """Rounds of one model by both loops: their raw seconds, median images per second, and median ratio."""
    case = _case(name, size, device)
    ours, bare = OurLoop(case), BareLoop(case)
    apart = warm_up(ours, bare, WARM_UP, limit=0.5 if case.bf16 else 0.1)
    seconds = interleave({"bare": bare, "ours": ours}, size.steps, size.rounds, device)
    images = size.steps * size.batch
    rates = {side: images / statistics.median(values) for side, values in seconds.items()}
    # neighbouring rounds saw the same machine, so their ratio says more than that of medians over the whole
    by_round = spread([b / o for o, b in zip(seconds["ours"], seconds["bare"], strict=True)])
    result = {
        **asdict(size),
        "ours_images_per_second": rates["ours"],
        "bare_images_per_second": rates["bare"],
        "ratio": by_round["median"],
        "ratio_by_round": by_round,
        "steady": steady(seconds["bare"]),
        "weights_apart_after_warm_up": apart,
        "seconds_by_round": seconds,
    }
    _show(name, result)
    return result


def _case(name: str, size: Size, device: torch.device) -> Case:
    settings = {"image_size": size.pixels} if name.startswith("vit") else {}
    inputs, targets = random_batch((size.batch, 3, size.pixels, size.pixels), CLASSES, device)
    gpu = device.type == "cuda"
    return Case(
        build=partial(torchvision_model, name, num_classes=CLASSES, **settings),
        inputs=inputs,
        targets=targets,
        prepare=scaled,
        device=device,
        max_norm=1.0,
        bf16=gpu,
        compile=gpu,
        channels_last=gpu,
    )


def _settings(device: torch.device) -> dict[str, Any]:
    """What both loops share, as dltrain's configuration says it."""
    config = config_of(_case("resnet18", Size(32, 1, 1, 1), device))
    return {
        "warm_up_steps": WARM_UP,
        "optim": config.optim.model_dump(mode="json"),
        "precision": config.precision.model_dump(mode="json"),
        "logging_every": str(config.logging.every),
        "hooks": [],
    }


def _summary(measured: dict[str, Any]) -> dict[str, float]:
    names = ("ours_images_per_second", "bare_images_per_second", "ratio")
    return {name: measured[name] for name in names}


def _show(name: str, result: dict[str, Any]) -> None:
    by_round = result["ratio_by_round"]
    busy = "" if result["steady"] else "; UNSTEADY: the machine was busy with something else, measure again"
    print(
        f"{name}: batch {result['batch']} of {result['pixels']} pixels, "
        f"ours {result['ours_images_per_second']:.1f} and bare {result['bare_images_per_second']:.1f} images/s, "
        f"ratio {result['ratio']:.3f} (by round {by_round['min']:.3f} to {by_round['max']:.3f}, half of them "
        f"{by_round['lower_quartile']:.3f} to {by_round['upper_quartile']:.3f}){busy}",
        flush=True,
    )
