"""The projector's features: of the right layer, of the right samples, and none rather than wrong ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dltrain.config import Config, Parallel, Precision
from dltrain.data.batch import Batch
from dltrain.tensorboard.features import SAMPLES, Features, has_features


def batch_of(images: Tensor, padding: int = 0, first: int = 0) -> Batch:
    count = len(images)
    position = torch.arange(first, first + count)
    position[count - padding :] = -1
    return Batch({"image": images}, torch.ones(count), tuple(f"k{first + n}" for n in range(count)), position)


def images_of(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def columns(batch: Batch) -> dict[str, list[str]]:
    return {"label": ["x"] * len(batch), "key": list(batch.keys)}


def table(data: bytes) -> list[list[str]]:
    return [line.split("\t") for line in data.decode().splitlines()]


def test_features_enter_the_last_linear_layer_and_padding_has_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    features = Features()
    features.watch(model)
    images = images_of(10)
    model(images.float())
    features.begin()
    for first, padding in ((0, 0), (5, 2)):
        batch = batch_of(images[first : first + 5], padding, first)
        for part in batch.split(2):  # micro-batches
            model(part.fields["image"].float())
        features.add(batch, columns(batch))
    files = features.files(30)
    expected = model[:3](images[:8].float()).detach().numpy()
    np.testing.assert_allclose(np.loadtxt(io.BytesIO(files["projector/features.tsv"])), expected, rtol=1e-4)
    assert table(files["projector/samples.tsv"]) == [["label", "key"], *(["x", f"k{n}"] for n in range(8))]
    sprite = np.asarray(Image.open(io.BytesIO(files["projector/images.png"])))
    assert sprite.shape == (96, 96, 3)
    assert sprite[0, 32, 0] == images[1, 0, 0]
    config = files["projector_config.pbtxt"].decode()
    assert 'tensor_name: "features at step 30"' in config
    assert "single_image_dim: 32" in config


@pytest.mark.parametrize(
    ("parallel", "precision", "some"),
    [
        ({"dp_shard": 2}, {}, True),
        ({"tp": 2}, {}, False),
        ({"cp": 2}, {}, False),
        ({"pp": 2}, {}, False),
        ({}, {"compile": True}, False),
    ],
)
def test_layouts_that_call_the_last_layer_with_whole_samples(
    parallel: dict[str, int], precision: dict[str, bool], some: bool
) -> None:
    assert has_features(Config(parallel=Parallel(**parallel), precision=Precision(**precision))) == some


def test_training_is_not_noted() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).train()
    features = Features()
    features.watch(model)
    features.begin()
    batch = batch_of(images_of(4))
    model(batch.fields["image"].float())
    features.add(batch, columns(batch))
    assert features.files(1) == {}


def test_at_most_a_thousand_samples_and_fewer_of_wide_features() -> None:
    for width, kept in ((3, SAMPLES), (5000, 200)):
        model, features = nn.Linear(width, 1).eval(), Features()
        features.watch(model)
        features.begin()
        for first in range(0, 1200, 300):
            batch = batch_of(images_of(300), first=first)
            model(torch.rand(300, width))
            features.add(batch, columns(batch))
        assert len(table(features.files(1)["projector/samples.tsv"])) == kept + 1


def test_of_tokens_the_mean_is_taken() -> None:
    model, features = nn.Linear(3, 1).eval(), Features()
    features.watch(model)
    features.begin()
    tokens = torch.rand(4, 6, 3)
    batch = batch_of(images_of(4))
    model(tokens)
    features.add(batch, columns(batch))
    found = np.loadtxt(io.BytesIO(features.files(1)["projector/features.tsv"]))
    np.testing.assert_allclose(found, tokens.mean(1).numpy(), rtol=1e-4)


def test_a_layer_that_is_called_twice_or_of_no_samples_has_no_features() -> None:
    for tensors in ([torch.rand(4, 3)] * 2, [torch.rand(3)], []):
        model, features = nn.Linear(3, 1).eval(), Features()
        features.watch(model)
        features.begin()
        for each in tensors:
            model(each)
        features.add(batch_of(images_of(4)), columns(batch_of(images_of(4))))
        assert features.files(1) == {}


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    features = Features()
    features.watch(nn.Conv2d(1, 1, 1))
    features.begin()
    features.add(batch_of(images_of(4)), columns(batch_of(images_of(4))))
    assert features.files(1) == {}
