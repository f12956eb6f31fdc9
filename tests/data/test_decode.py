"""Decoders: the pixels of a reference decoder, and one sentence for bytes that are something else."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from dltrain.data import image as images
from dltrain.data.decode import decode_crop, decode_field, decode_label
from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    """Smooth, so that decoders and resizers may differ by little alone."""
    y, x = np.mgrid[:height, :width]
    bands = [128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 50), 255 * x / width]
    return np.stack(bands, axis=2).astype(np.uint8)


def encoded(pixels: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, **options).save(buffer, kind)
    return buffer.getvalue()


def sample(**fields: bytes) -> Sample:
    return Sample("k", fields, "s3://bucket/shard.tar")


@pytest.mark.parametrize("codec", ["simplejpeg", "pillow"])
def test_a_jpeg_has_the_pixels_of_its_picture(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if codec == "pillow":
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    pixels = picture(120, 160)
    found = decode_field(sample(jpg=encoded(pixels, "JPEG")), "jpg")
    assert found.shape == (120, 160, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - pixels).mean() < 3


def test_a_jpeg_that_simplejpeg_does_not_know_is_left_to_pillow() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 40)).convert("CMYK").save(buffer, "JPEG")
    assert decode_field(sample(jpg=buffer.getvalue()), "jpg").shape == (40, 40, 3)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("shape", [(60, 80), (500, 375), (1200, 900), (2000, 2400)])
def test_the_middle_of_an_image_is_what_pillow_makes_of_it(kind: str, shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    data = encoded(pixels, {"jpg": "JPEG", "png": "PNG"}[kind])
    found = decode_crop(sample(**{kind: data}), kind, 224)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    image = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
    assert found.shape == (224, 224, 3)
    assert np.abs(found.astype(int) - expected).mean() < 4


def test_random_crops_follow_their_generator_and_their_bounds() -> None:
    one = sample(jpg=encoded(picture(300, 400), "JPEG"))
    crops = [decode_crop(one, "jpg", 32, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    for seed in range(200):
        top, left, high, wide = images._box(300, 400, np.random.default_rng(seed), (0.35, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= 300 - high
        assert 0 <= left <= 400 - wide
        assert 0.34 < high * wide / (300 * 400) <= 1.01 or (high, wide) == (300, 300)


def test_a_large_jpeg_is_decoded_at_the_smallest_scale_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, whole = [], simplejpeg.decode_jpeg

    def watched(*arguments: Any, **named: Any) -> np.ndarray[Any, Any]:
        pixels = whole(*arguments, **named)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    for side in (300, 500, 1000, 2000):
        decode_crop(sample(jpg=encoded(picture(side, side), "JPEG")), "jpg", 224)
    assert shapes == [(300, 300), (250, 250), (250, 250), (250, 250)]


@pytest.mark.parametrize("extension", ["jpg", "png", "npy", "cls", "json"])
def test_bytes_that_are_something_else_name_their_sample(extension: str) -> None:
    with pytest.raises(BadSample, match=rf"cannot decode field '{extension}' of s3://bucket/shard\.tar#k"):
        decode_field(sample(**{extension: b"\xff\xd8 nothing of the kind"}), extension)


def test_pickles_are_refused_unless_allowed_by_name() -> None:
    one = sample(pyd=pickle.dumps([1, 2]))
    with pytest.raises(UserError, match=r"'pyd' of s3://.*#k is pickled.*allow_pickle=True"):
        decode_field(one, "pyd")
    assert decode_field(one, "pyd", allow_pickle=True).tolist() == [1, 2]
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadSample, match="cannot decode field 'npy'"):
        decode_field(sample(npy=pickled.getvalue()), "npy")


def test_labels_and_fields_that_are_not_there_are_told() -> None:
    with pytest.raises(BadSample, match=r"has label 12, but there are 10 classes"):
        decode_label(sample(cls=b"12"), 10)
    with pytest.raises(BadSample, match=r"has no field 'png'; it has: cls, jpg"):
        decode_field(sample(cls=b"1", jpg=b""), "png")
    with pytest.raises(UserError, match=r"no decoder for 'mp4'"):
        decode_field(sample(mp4=b""), "mp4")
