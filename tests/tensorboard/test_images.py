"""Samples as pictures: what is an image, what a series, and whose label stands under it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain.data.batch import Batch
from dltrain.tensorboard.images import (
    SHOWN,
    as_pixels,
    captions_of,
    grid,
    inputs,
    labels_of,
    predicted_of,
    sprites,
)


def batch_of(**fields: torch.Tensor) -> Batch:
    count = len(next(iter(fields.values())))
    return Batch(fields, torch.ones(count), tuple(f"k{place}" for place in range(count)), torch.arange(count))


def test_labels_are_names_of_classes_where_the_data_have_them() -> None:
    batch = batch_of(size=torch.rand(3), cls=torch.tensor([2, 0, 7]))
    assert labels_of(batch, {"classes": ["cat", "dog", "owl"]}) == ["owl", "cat", "7"]
    assert labels_of(batch, {}) == ["2", "0", "7"]
    assert captions_of(batch_of(size=torch.rand(2)), {}) == ["k0", "k1"]


def test_predictions_are_named_where_outputs_are_classes() -> None:
    facts = {"classes": ["cat", "dog"]}
    assert predicted_of(torch.tensor([[0.0, 1.0], [3.0, 1.0]]), facts) == ["dog", "cat"]
    assert predicted_of(torch.rand(2, 5), facts) == predicted_of(torch.rand(2, 2), {}) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "is_image"),
    [
        ((2, 5, 4), torch.uint8, True),
        ((2, 5, 4, 1), torch.uint8, True),
        ((2, 5, 4, 3), torch.uint8, True),
        ((2, 3, 5, 4), torch.uint8, True),
        ((2, 1, 5, 4), torch.float32, True),
        ((2, 5, 4, 7), torch.float32, False),
        ((2, 50, 3), torch.float32, False),
        ((2,), torch.int64, False),
    ],
)
def test_what_an_image_is(shape: tuple[int, ...], dtype: torch.dtype, is_image: bool) -> None:
    values = (torch.rand(shape) * 255).to(dtype)
    pixels = as_pixels(values)
    assert (pixels is not None) == is_image
    if pixels is not None:
        assert pixels.shape == (2, 5, 4, 3)
        assert pixels.dtype == np.uint8


def test_inputs_are_grids_of_images_and_of_series() -> None:
    batch = batch_of(
        image=torch.full((20, 8, 8), 200, dtype=torch.uint8), values=torch.rand(20, 50, 2), mean=torch.rand(20)
    )
    found = dict(inputs(batch, {}))
    assert sorted(found) == ["image", "values"]
    # 16 samples of 8 x 8 pixels, each 14 times as large, in four columns under a caption each
    assert found["image"].shape == (4 * (112 + 20 + 6) + 6, 4 * (112 + 6) + 6, 3)
    assert (found["image"] == 200).all(2).sum() == SHOWN * 112 * 112
    assert (found["image"] < 100).all(2).any(), "captions are drawn"
    assert len(np.unique(found["values"].reshape(-1, 3), axis=0)) > 3


def test_a_caption_that_is_too_long_is_cut() -> None:
    image = Image.new("RGB", (40, 40), "white")
    long, short = grid([image], ["a label of very many words"]), grid([image], ["ab"])
    assert long.shape == short.shape
    dark = (long < 128).all(2)
    assert dark.any()
    assert not dark[:, -4:].any()


def test_sprites_are_square_and_in_order() -> None:
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 4, 3), np.uint8)
    whole = np.asarray(sprites(pixels, 8))
    assert whole.shape == (24, 24, 3)
    assert [int(whole[row * 8, column * 8, 0]) for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))] == [
        0,
        1,
        2,
        3,
        4,
    ]
