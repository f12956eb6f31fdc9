"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016), torchvision's, with a plan.

Parameters keep torchvision's names, so that its files of weights fit (`model.weights`). The forward is made a chain of
modules, which a pipeline may cut. There is no tensor plan: splitting channels sends the activations of every
convolution between ranks, which costs more than it saves at these widths; shard with ``parallel.dp_shard`` instead, or
cut with ``parallel.pp``. Batch norm makes a sample's output depend on the batch: see ``precision.batch_norm``.
"""

from __future__ import annotations

from torch import nn

from dltrain.models.vision.torchvision import torchvision_model
from dltrain.parallel.plan import Plan

_LAYERS = ("layer1.*", "layer2.*", "layer3.*", "layer4.*")

PLAN = Plan(units=_LAYERS, chain=("conv1", "bn1", "relu", "maxpool", *_LAYERS, "avgpool", "fc"))


def resnet(name: str, classes: int) -> nn.Module:
    """``resnet18``, ``resnet50`` or another of torchvision's: logits [n, classes] of images [n, 3, height, width],
    float32, with random weights. Raises :class:`~dltrain.errors.UserError` without torchvision."""
    model = torchvision_model(name, num_classes=classes, weights=None)
    model.avgpool = nn.Sequential(model.get_submodule("avgpool"), nn.Flatten())  # its forward flattens between the two
    model.relu = nn.ReLU()  # not in place: a stage that begins here must leave what it was sent
    return model
