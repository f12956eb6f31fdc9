"""Samples as pictures: a grid of images or of series, each under its label; drawn by Pillow, in milliseconds.

for name, picture in inputs(batch, task.facts): ...  # uint8 [height, width, 3]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard.summary import image

from dltrain.data.batch import Batch

Picture = np.ndarray[Any, np.dtype[np.uint8]]

SHOWN = 16
"""Samples of a grid."""

_SIDE = 112
"""Pixels of a sample, at least; and at most twice as many."""

_CAPTION, _GAP = 20, 6
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")
"""Of the channels of a series, the first few of them."""

_FINER = 3
"""Times larger that lines are drawn, so that they are smooth."""

_SERIES = 8
"""Steps from which on numbers in a row are shown as a series."""


def inputs(batch: Batch, facts: Mapping[str, Any]) -> Iterator[tuple[str, Picture]]:
    """Each field of the batch that can be seen, by name: its first samples with their labels."""
    captions = captions_of(batch, facts)
    for name, values in batch.fields.items():
        few = values[:SHOWN].cpu()
        pixels = as_pixels(few)
        if pixels is not None:
            yield name, grid([_sized(Image.fromarray(each)) for each in pixels], captions)
        elif (steps := _as_series(few)) is not None:
            yield name, grid([_drawn(each) for each in steps], captions)


def picture(tag: str, pixels: Picture) -> Summary:
    """For the tab of images; pixels [height, width, 3]."""
    return image(tag, pixels, dataformats="HWC")  # type: ignore[no-untyped-call]


def picture_of(tag: str, file: Path) -> Summary:
    """The same of an image file."""
    return picture(tag, np.asarray(Image.open(file).convert("RGB")))


def labels_of(batch: Batch, facts: Mapping[str, Any]) -> list[str]:
    """What the samples are: the names of their classes where the data have them, or the whole number that each sample
    has, by the first field of such; empty without one."""
    for values in (batch.host or batch).fields.values():
        if values.dim() == 1 and not values.is_floating_point() and not values.is_complex():
            return [_named(number, facts.get("classes")) for number in values.tolist()]
    return [""] * len(batch)


def predicted_of(outputs: Any, facts: Mapping[str, Any]) -> list[str]:
    """Names of the classes with the largest of the outputs [n, classes]; none where that is not what they are."""
    names = facts.get("classes")
    if isinstance(names, list) and isinstance(outputs, Tensor) and outputs.shape[1:] == (len(names),):
        return [_named(number, names) for number in outputs.argmax(1).tolist()]
    return []


def captions_of(batch: Batch, facts: Mapping[str, Any]) -> list[str]:
    """The samples' labels, or their keys where there are none."""
    labels = labels_of(batch, facts)
    return labels if any(labels) else list(batch.keys)


def as_pixels(values: Tensor) -> Picture | None:
    """Images of a field, uint8 [n, height, width, 3]; ``None`` where it holds none. Images are uint8 [n, height, width]
    or with 1 or 3 channels last, or of floats with 1 or 3 channels last or second, whose range is stretched."""
    if values.dtype == torch.uint8 and values.dim() == 3:
        values = values[..., None]
    if values.dim() != 4 or not (values.dtype == torch.uint8 or values.is_floating_point()):
        return None
    if values.shape[3] not in (1, 3):
        values = values.permute(0, 2, 3, 1)
    if values.shape[3] not in (1, 3):
        return None
    if values.dtype != torch.uint8:
        least, largest = values.min(), values.max()
        values = ((values - least) / (largest - least).clamp(min=1e-12) * 255).nan_to_num().to(torch.uint8)
    return np.ascontiguousarray(values.expand(-1, -1, -1, 3).numpy())


def sprites(pixels: Picture, side: int) -> Image.Image:
    """One square image of all, row by row, each ``side`` pixels wide and high: as the projector takes them."""
    columns = math.ceil(len(pixels) ** 0.5)
    whole = Image.new("RGB", (columns * side, columns * side))
    for place, each in enumerate(pixels):
        enlarged = Image.fromarray(each).resize((side, side), _method(each.shape[0], side))
        whole.paste(enlarged, (place % columns * side, place // columns * side))
    return whole


def grid(images: Sequence[Image.Image], captions: Sequence[str]) -> Picture:
    """Images of one size with a caption under each, uint8 [height, width, 3]."""
    width, height = images[0].size
    columns = min(len(images), max(4, math.ceil((len(images) * height / width) ** 0.5)) if width < 2 * height else 2)
    rows = math.ceil(len(images) / columns)
    step = (width + _GAP, height + _CAPTION + _GAP)
    whole = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    for place, (each, caption) in enumerate(zip(images, captions, strict=False)):
        left, top = place % columns * step[0] + _GAP, place // columns * step[1] + _GAP
        whole.paste(each, (left, top))
        pen.text((left + width / 2, top + height + 2), _fitting(caption, width, font), "black", font, "ma")
    return np.asarray(whole)


def _named(number: int, names: Any) -> str:
    return str(names[number]) if isinstance(names, list) and 0 <= number < len(names) else str(number)


def _method(before: int, after: int) -> Image.Resampling:
    """Pixels stay square when they are enlarged."""
    return Image.Resampling.NEAREST if before <= after else Image.Resampling.LANCZOS


def _sized(each: Image.Image) -> Image.Image:
    """Between one and two times the side of a sample, by a whole factor where it is enlarged."""
    side = max(each.size)
    factor = math.ceil(_SIDE / side) if side < _SIDE else min(1.0, 2 * _SIDE / side)
    size = (max(1, round(each.width * factor)), max(1, round(each.height * factor)))
    return each if size == each.size else each.resize(size, _method(side, max(size)))


def _as_series(values: Tensor) -> Tensor | None:
    """Floats [n, steps] or [n, steps, channels] as [n, channels, steps]; ``None`` for anything else."""
    if not values.is_floating_point() or values.dim() not in (2, 3) or values.shape[1] < _SERIES:
        return None
    return (values[..., None] if values.dim() == 2 else values).transpose(1, 2)[:, : len(_COLOURS)].float()


def _drawn(series: Tensor) -> Image.Image:
    """Lines of [channels, steps], each channel from its least to its largest value."""
    size = (3 * _SIDE * _FINER, _SIDE * _FINER)
    whole = Image.new("RGB", size, "#f6f6f6")
    pen = ImageDraw.Draw(whole)
    for colour, values in zip(_COLOURS, series, strict=False):
        finite = values.nan_to_num()
        share = (finite - finite.min()) / (finite.max() - finite.min()).clamp(min=1e-12)
        across = torch.linspace(_FINER, size[0] - _FINER, len(share)).tolist()
        down = (size[1] * (0.95 - 0.9 * share)).tolist()
        pen.line(list(zip(across, down, strict=True)), colour, _FINER + 1, "curve")
    return whole.reduce(_FINER)


def _fitting(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
