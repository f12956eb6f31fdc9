"""Random crops of 224 x 224 x 3 (uint8) from JPEGs: one box and one resize for all peers, and two decoders.

The box is torchvision's RandomResizedCrop: an area between 0.35 and 1 of the picture, a ratio between 3:4 and 4:3.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 224
AREA, RATIO = (0.35, 1.0), (3 / 4, 4 / 3)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def random_box(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random part of a picture; the whole picture where none fits."""
    for _ in range(10):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            left, upper = random.randint(0, width - across), random.randint(0, height - down)
            return left, upper, left + across, upper + down
    return 0, 0, width, height


def crop_image(image: Image, random: Random) -> Pixels:
    """From a Pillow image, as torchvision's transforms do it: bilinear, antialiased."""
    from PIL import Image

    box = random_box(*image.size, random)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def crop_by_pillow(data: bytes, random: Random) -> Pixels:
    """From a JPEG, decoded by Pillow."""
    from PIL import Image

    return crop_image(Image.open(io.BytesIO(data)).convert("RGB"), random)


def crop_by_simplejpeg(data: bytes, random: Random) -> Pixels:
    """From a JPEG, decoded whole by simplejpeg, resized by Pillow: the same for every contestant."""
    import simplejpeg
    from PIL import Image

    return crop_image(Image.fromarray(simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)), random)


def cropper(decoder: str) -> Callable[[bytes, Random], Pixels]:
    """What turns a JPEG into a crop: ``simplejpeg`` or ``pillow``."""
    return {"simplejpeg": crop_by_simplejpeg, "pillow": crop_by_pillow}[decoder]
