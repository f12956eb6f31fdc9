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
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dltrain.data.image import Array, Box, choose_box, cut, image_pixels, jpeg_pixels
from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError

Found = TypeVar("Found")

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
    return guarded(sample.where, name, lambda: decoder(bytes(data)))


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
    return encode_crop(sample, name, size, random, scale, ratio).decode()


def encode_crop(
    sample: Sample,
    name: str,
    size: int,
    random: np.random.Generator | None = None,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> EncodedCrop:
    """The same piece as of :func:`decode_crop`, still encoded: a GPU decodes it where it can (``data.decode device``).

    Where it cannot, the loader does, and the batch is the same. Only JPEGs are worth it, and other images may be given.
    """
    data = bytes(_field(sample, name))
    box = guarded(sample.where, name, lambda: choose_box(data, random, scale, ratio))
    return EncodedCrop(data, box, size, sample.where, name)


@dataclass(frozen=True)
class EncodedCrop:
    """An image's bytes, the piece wanted of it (top, left, height, width), and the size of the result."""

    data: bytes
    box: Box
    size: int
    where: str
    field: str

    def decode(self) -> Array:
        """The piece as uint8 [size, size, 3]. Raises :class:`BadSample`."""
        return guarded(self.where, self.field, lambda: cut(self.data, self.box, self.size))


def _field(sample: Sample, name: str) -> Any:
    data = sample.fields.get(name)
    if data is None:
        raise BadSample(f"{sample.where} has no field {name!r}; it has: {', '.join(sorted(sample.fields))}")
    return data


def guarded(where: str, name: str, decode: Callable[[], Found]) -> Found:
    """What ``decode`` makes of a field of the sample at ``where``. Raises :class:`BadSample` where it fails."""
    try:
        return decode()
    except (ValueError, OSError, TypeError, EOFError, SyntaxError) as error:  # Pillow tells a broken PNG by the last
        reason = re.sub(r" <.*?>", "", str(error))  # Pillow names the object it was given
        raise BadSample(
            f"cannot decode field {name!r} of {where}: {reason}; write the sample anew, or let some be replaced "
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


def _label(data: bytes) -> Array:
    return np.int64(data.decode().strip())  # type: ignore[return-value]


_DECODERS: dict[str, Callable[[bytes], Array]] = {
    "jpg": jpeg_pixels,
    "jpeg": jpeg_pixels,
    "png": image_pixels,
    "webp": image_pixels,
    "bmp": image_pixels,
    "cls": _label,
    "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=False),
    "json": lambda data: np.asarray(json.loads(data), dtype=np.float64),
}
