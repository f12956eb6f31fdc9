"""Images that a GPU decodes: pieces of JPEGs travel as bytes, and become pixels as their batch is copied to it.

torchvision offers nvJPEG, which has hardware of its own on data-centre GPUs. The host then only reads headers and draws
the pieces, the same as it would cut itself, so that workers are few and the copy is a tenth.

    crops = EncodedCrops.pack([encode_crop(sample, "jpg", 224, random) for sample in samples])
    pixels = crops.to(torch.device("cuda"))  # uint8 [n, 224, 224, 3]
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dltrain.data.decode import EncodedCrop
from dltrain.data.image import Box
from dltrain.errors import UserError

Decoder = Callable[[list[Tensor], torch.device], list[Tensor]]
"""From JPEGs, uint8 [bytes] each on the host, to uint8 [3, height, width] each on the device.

Raises ``RuntimeError`` when it cannot decode one of them."""


_AT_ONCE = 32
"""Images that lie on the device whole at a time: photos of 12 megapixels take 36 MB each."""


@cache
def lacks_decoder(device: torch.device) -> str:
    """Why images cannot be decoded on ``device``, found by decoding one; empty when they can."""
    if device.type != "cuda":
        return "there is no GPU"
    from PIL import Image

    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    try:
        _nvjpeg([torch.frombuffer(bytearray(jpeg.getvalue()), dtype=torch.uint8)], device)
    except Exception as error:  # noqa: BLE001  builds without it differ in what they raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"torchvision does not decode on it ({reason})"
    return ""


@dataclass(frozen=True)
class EncodedCrops:
    """A batch of them: their bytes end to end, uint8 [bytes], so that workers hand over one tensor."""

    data: Tensor
    crops: tuple[EncodedCrop, ...]
    """Without their bytes."""
    ends: tuple[int, ...]

    @classmethod
    def pack(cls, crops: Sequence[EncodedCrop]) -> EncodedCrops:
        """Raises :class:`UserError` when their sizes differ."""
        other = next((crop for crop in crops if crop.size != crops[0].size), None)
        if other is not None:
            raise UserError(
                f"field {other.field!r} of {other.where} is cut to {other.size} pixels, {crops[0].where} to "
                f"{crops[0].size}; make them equal in the task's sample()"
            )
        data = torch.from_numpy(np.frombuffer(b"".join(crop.data for crop in crops), np.uint8).copy())
        ends = np.cumsum([len(crop.data) for crop in crops]).tolist()
        return cls(data, tuple(replace(crop, data=b"") for crop in crops), tuple(ends))

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, part: slice) -> EncodedCrops:
        first, last, _ = part.indices(len(self))
        begin = self.ends[first - 1] if first else 0
        ends = tuple(end - begin for end in self.ends[first:last])
        return EncodedCrops(self.data[begin : begin + (ends[-1] if ends else 0)], self.crops[first:last], ends)

    def to(self, device: torch.device, decoder: Decoder | None = None) -> Tensor:
        """Pixels, uint8 [n, size, size, 3], on the device. Raises :class:`BadSample` for what neither it nor the host
        can decode."""
        some = (self[first : first + _AT_ONCE] for first in range(0, len(self), _AT_ONCE))
        return torch.stack([pixels for part in some for pixels in part._decode(device, decoder or _nvjpeg)])

    def _decode(self, device: torch.device, decoder: Decoder) -> list[Tensor]:
        pieces = self._pieces()
        try:
            images = decoder(pieces, device)
        except RuntimeError as error:  # it does not say which
            _refuse_other(error)
            return [self._one(place, piece, device, decoder) for place, piece in enumerate(pieces)]
        return [_cut(image, crop.box, crop.size) for image, crop in zip(images, self.crops, strict=True)]

    def _pieces(self) -> list[Tensor]:
        begins = (0, *self.ends[:-1])
        return [self.data[begin:end] for begin, end in zip(begins, self.ends, strict=True)]

    def _one(self, place: int, piece: Tensor, device: torch.device, decoder: Decoder) -> Tensor:
        """One image by itself; by the host where the device does not know it (CMYK, or no JPEG at all)."""
        crop = self.crops[place]
        try:
            return _cut(decoder([piece], device)[0], crop.box, crop.size)
        except RuntimeError as error:
            _refuse_other(error)
            pixels = replace(crop, data=piece.numpy().tobytes()).decode()
            return torch.from_numpy(pixels).to(device)


def _refuse_other(error: RuntimeError) -> None:
    """Raise again what is no fault of an image: memory that is short, a device that failed."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        raise error


def _nvjpeg(pieces: list[Tensor], device: torch.device) -> list[Tensor]:
    """By torchvision, which decodes on a stream of its own into memory of the current stream: what is queued there may
    still read that memory, so it is waited for."""
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.cuda.current_stream(device).synchronize()
    images: list[Tensor] = decode_jpeg(pieces, mode=ImageReadMode.RGB, device=device)
    return images


def _cut(image: Tensor, box: Box, size: int) -> Tensor:
    """A piece of uint8 [3, height, width] as uint8 [size, size, 3]."""
    top, left, high, wide = box
    piece = image[None, :, top : top + high, left : left + wide].float()
    scaled = torch.nn.functional.interpolate(piece, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
