"""From bytes to arrays by extension.

``jpg``/``jpeg`` through simplejpeg (1.9 to 2.9 times as fast as Pillow), or Pillow where it will not load or meets a
JPEG it does not know (CMYK); ``png`` and other images through Pillow; ``cls`` as int64, ``npy`` without pickles,
``json`` as its numbers. A field is decoded when it is asked for. Images come as uint8 [height, width, 3], or
[height, width] where they are grey; normalisation is the device's work.

    image = decode_crop(sample, "jpg", size=224, random=random)
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError

Array = np.ndarray[Any, Any]

PICKLED = ("pyd", "pkl", "pickle", "pth", "pt")
"""Extensions whose bytes are programs: loading them runs whatever their author wrote."""


def decode_fields(sample: Sample) -> dict[str, Array]:
    """Every field of a sample as an array. Raises :class:`UserError` naming shard, key and field."""
    return {name: decode_field(sample, name) for name in sample.fields}


def decode_field(sample: Sample, name: str, allow_pickle: bool = False) -> Array:
    """One field of a sample as an array.

    Raises :class:`BadSample` for bytes that are not what their extension says, and :class:`UserError` for a field that
    is not there, has no decoder, or is pickled: ``allow_pickle`` loads such a field, which runs its author's code.
    """
    data = _field(sample, name)
    if isinstance(data, np.ndarray):
        return data
    decoder = _decoder(name.rpartition(".")[2], sample, name, allow_pickle)
    return _guarded(sample, name, lambda: decoder(bytes(data)))


def decode_label(sample: Sample, classes: int, name: str = "cls") -> Array:
    """A class label as int64 scalar. Raises :class:`UserError` naming the sample when it is not in [0, classes)."""
    label = decode_field(sample, name)
    if not 0 <= int(label) < classes:
        raise BadSample(
            f"{sample.where} has label {int(label)}, but there are {classes} classes (labels 0 to {classes - 1}); "
            "correct the label, or give the recipe more classes"
        )
    return label


def decode_record(sample: Sample) -> dict[str, Any]:
    """The features of a record, by name: of a TFRecord's ``tf.train.Example`` or a SageMaker RecordIO's ``Record``.

    Values are arrays, or lists of bytes. Raises :class:`BadSample` for bytes that are neither.
    """
    from dltrain.data.formats import recordio, tfrecord

    name = "record" if "record" in sample.fields else "tfrecord"
    data = bytes(_field(sample, name))
    try:
        return dict(recordio.parse_record(data) if name == "record" else tfrecord.parse_example(data))
    except ValueError as error:
        raise BadSample(f"cannot decode field {name!r} of {sample.where}: {error}") from None


def decode_crop(
    sample: Sample,
    name: str,
    size: int,
    random: np.random.Generator | None = None,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """An image field as uint8 [size, size, 3]: a random piece of it, or its middle square without ``random``.

    The piece has ``scale`` of the area and ``ratio`` of width to height, each drawn as in Szegedy et al. (2015). A JPEG
    is decoded at a half, a quarter or an eighth where the piece still has ``size`` pixels there.
    """
    data = bytes(_field(sample, name))
    return _guarded(sample, name, lambda: _crop(data, size, random, scale, ratio))


def _field(sample: Sample, name: str) -> Any:
    data = sample.fields.get(name)
    if data is None:
        raise BadSample(f"{sample.where} has no field {name!r}; it has: {', '.join(sorted(sample.fields))}")
    return data


def _guarded(sample: Sample, name: str, decode: Callable[[], Array]) -> Array:
    try:
        return decode()
    except (ValueError, OSError, TypeError, EOFError, SyntaxError) as error:  # Pillow tells a broken PNG by the last
        reason = re.sub(r" <.*?>", "", str(error))  # Pillow names the object it was given
        raise BadSample(
            f"cannot decode field {name!r} of {sample.where}: {reason}; write the sample anew, or let some be replaced "
            "with data.bad_samples"
        ) from None


def _decoder(extension: str, sample: Sample, name: str, allow_pickle: bool) -> Callable[[bytes], Array]:
    if extension in PICKLED:
        if not allow_pickle:
            raise UserError(
                f"field {name!r} of {sample.where} is pickled, and loading it would run code; if you trust its author, "
                f"load it by name: decode_field(sample, {name!r}, allow_pickle=True)"
            )
        return _unpickle
    if extension not in _DECODERS:
        raise UserError(f"no decoder for {extension!r} of {sample.where}: there are {', '.join(_DECODERS)}")
    return _DECODERS[extension]


def _unpickle(data: bytes) -> Array:
    import pickle

    return np.asarray(pickle.loads(data))


def _jpeg(data: bytes) -> Array:
    codec = _simplejpeg()
    if codec is not None:
        try:
            return np.asarray(codec.decode_jpeg(data, fastdct=True, fastupsample=True))
        except ValueError:  # CMYK and the like, which Pillow reads; it tells what is really broken
            return _image(data)
    return _image(data)


def _image(data: bytes) -> Array:
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


def _crop(
    data: bytes,
    size: int,
    random: np.random.Generator | None,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Array:
    codec = _simplejpeg() if data[:2] == b"\xff\xd8" else None
    if codec is None:
        pixels = _colour(_image(data))
        height, width = pixels.shape[:2]
        top, left, high, wide = _box(height, width, random, scale, ratio)
        return _resized(pixels[top : top + high, left : left + wide], size)
    height, width, *_ = codec.decode_jpeg_header(data)
    top, left, high, wide = _box(height, width, random, scale, ratio)
    shrink = 1
    while shrink < 8 and min(high, wide) >= 2 * shrink * size:
        shrink *= 2  # between these scales libjpeg-turbo has no vector code, and is slower than at full size
    pixels = codec.decode_jpeg(
        data, fastdct=True, fastupsample=True, min_height=height // shrink, min_width=width // shrink
    )
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    rows = slice(round(top * down), round((top + high) * down))
    return _resized(pixels[rows, round(left * across) : round((left + wide) * across)], size)


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
) -> tuple[int, int, int, int]:
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


def _label(data: bytes) -> Array:
    return np.int64(data.decode().strip())  # type: ignore[return-value]


_DECODERS: dict[str, Callable[[bytes], Array]] = {
    "jpg": _jpeg,
    "jpeg": _jpeg,
    "png": _image,
    "webp": _image,
    "bmp": _image,
    "cls": _label,
    "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=False),
    "json": lambda data: np.asarray(json.loads(data), dtype=np.float64),
}
