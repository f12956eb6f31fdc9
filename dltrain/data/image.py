"""Pixels from the bytes of an image: all of them, or a piece scaled to a size.

JPEGs go through simplejpeg (1.9 to 2.9 times as fast as Pillow), or Pillow where it will not load or meets one it does
not know (CMYK); other images through Pillow.

    pixels = cut(data, choose_box(data, random, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3)), size=224)
"""

from __future__ import annotations

import io
import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

Box = tuple[int, int, int, int]
"""Top, left, height and width of a piece of an image, in pixels."""


def jpeg_pixels(data: bytes) -> Array:
    """A JPEG as uint8 [height, width, 3]. Raises ``ValueError``, ``OSError``."""
    codec = _simplejpeg()
    if codec is not None:
        try:
            return np.asarray(codec.decode_jpeg(data, fastdct=True, fastupsample=True))
        except ValueError:  # CMYK and the like, which Pillow reads; it tells what is really broken
            return image_pixels(data)
    return image_pixels(data)


def image_pixels(data: bytes) -> Array:
    """Any image Pillow knows as uint8 [height, width, 3], or [height, width] where it is grey."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:  # no wheel for this platform
        return None
    return simplejpeg


def choose_box(
    data: bytes, random: np.random.Generator | None, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random piece of an image, or its middle square without ``random``; only the image's header is read."""
    codec = _codec_of(data)
    if codec is not None:
        height, width, *_ = codec.decode_jpeg_header(data)
    else:
        from PIL import Image

        width, height = Image.open(io.BytesIO(data)).size
    return _box(height, width, random, scale, ratio)


def cut(data: bytes, box: Box, size: int) -> Array:
    """A piece of an image as uint8 [size, size, 3]."""
    top, left, high, wide = box
    pixels, down, across = _pixels_for(data, box, size)
    rows = slice(round(top * down), round((top + high) * down))
    return _resized(pixels[rows, round(left * across) : round((left + wide) * across)], size)


def _pixels_for(data: bytes, box: Box, size: int) -> tuple[Array, float, float]:
    """The image, at whatever scale down and across is enough for the piece."""
    codec = _codec_of(data)
    if codec is not None:
        try:
            return _shrunk(codec, data, box, size)
        except ValueError:  # CMYK and the like, which Pillow reads; it tells what is really broken
            return _colour(image_pixels(data)), 1.0, 1.0
    return _colour(image_pixels(data)), 1.0, 1.0


def _shrunk(codec: ModuleType, data: bytes, box: Box, size: int) -> tuple[Array, float, float]:
    """A JPEG at a half, a quarter or an eighth where the piece still has ``size`` pixels there."""
    height, width, *_ = codec.decode_jpeg_header(data)
    shrink = 1
    while shrink < 8 and min(box[2:]) >= 2 * shrink * size:
        shrink *= 2  # between these scales libjpeg-turbo has no vector code, and is slower than at full size
    pixels = codec.decode_jpeg(
        data, fastdct=True, fastupsample=True, min_height=height // shrink, min_width=width // shrink
    )
    return pixels, pixels.shape[0] / height, pixels.shape[1] / width


def _codec_of(data: bytes) -> ModuleType | None:
    return _simplejpeg() if data[:2] == b"\xff\xd8" else None


def _resized(pixels: Array, size: int) -> Array:
    """Bilinear and antialiased, by torch: a fifth of Pillow's time for the same pixels."""
    import torch

    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # torch sees, and gives, channels last
    resized = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _colour(pixels: Array) -> Array:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels.copy()  # Pillow's are read-only


def _box(
    height: int, width: int, random: np.random.Generator | None, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Top, left, height and width of a piece: ten draws, then the middle square."""
    for _ in range(10 if random is not None else 0):
        area = height * width * random.uniform(*scale)  # type: ignore[union-attr]
        shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))  # type: ignore[union-attr]
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            top, left = random.integers(height - high + 1), random.integers(width - wide + 1)  # type: ignore[union-attr]
            return int(top), int(left), high, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
