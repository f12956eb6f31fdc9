"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022), torchvision's, with a plan.

Parameters keep torchvision's names, so that its files of weights fit (`model.weights`). Most of the work is in the two
linear layers of each block, which tensor parallelism splits; the depthwise convolutions before them are whole on every
rank. There is no batch norm. Stochastic depth drops whole blocks of a sample at random: 0 makes layouts comparable.
"""

from __future__ import annotations

from torch import nn

from dltrain.models.vision.torchvision import torchvision_model
from dltrain.parallel.plan import Plan

PLAN = Plan(
    units=("features.1.*", "features.2", "features.3.*", "features.4", "features.5.*", "features.6", "features.7.*"),
    tensor={"features.*.*.block.3": "column", "features.*.*.block.5": "row"},
    chain=("features.*", "avgpool", "classifier"),
)


def convnext(name: str, classes: int, stochastic_depth: float = 0.1) -> nn.Module:
    """``convnext_tiny`` or another of torchvision's: logits [n, classes] of images [n, 3, height, width], float32, both
    at least 32, with random weights. Raises :class:`~dltrain.errors.UserError` without torchvision."""
    return torchvision_model(name, num_classes=classes, weights=None, stochastic_depth_prob=stochastic_depth)
