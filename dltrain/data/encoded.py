"""Images that a GPU decodes: pieces of JPEGs travel as bytes, and become pixels as their batch is copied to it.

torchvision offers nvJPEG, which has hardware of its own on data-centre GPUs. The host then only reads headers and draws
the pieces, the same as it would cut itself, so that workers are few and the copy is a tenth.

    crops = EncodedCrops.pack([encode_crop(sample, "jpg", 224, random) for sample in samples])
    pixels = crops.to(torch.device("cuda"))  # uint8 [n, 224, 224, 3]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dltrain.data.decode import EncodedCrop
from dltrain.data.image import Box
from dltrain.errors import UserError

Decoder = Callable[[list[Tensor], torch.device], list[Tensor]]
"""From JPEGs, uint8 [bytes] each on the host, to uint8 [3, height, width] each on the device.

Raises ``RuntimeError`` when it cannot decode one of them."""


def lacks_decoder(device: torch.device) -> str:
    """Why images cannot be decoded on ``device``; empty when they can."""
    if device.type != "cuda":
        return "there is no GPU"
    try:
        from torchvision.io import decode_jpeg  # noqa: F401
    except ImportError:
        return "this torchvision does not offer it"
    return "" if hasattr(torch.ops.image, "decode_jpegs_cuda") else "this torchvision was built without nvJPEG"


@dataclass(frozen=True)
class EncodedCrops:
    """A batch of them: their bytes end to end, uint8 [bytes], so that workers and pinned memory move one tensor."""

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

    def pin_memory(self) -> EncodedCrops:
        return self  # nvJPEG reads them where they are

    def to(self, device: torch.device, non_blocking: bool = True, decoder: Decoder | None = None) -> Tensor:
        """Pixels, uint8 [n, size, size, 3], on the device. Raises :class:`BadSample` for what neither it nor the host
        can decode."""
        pieces = self._pieces()
        decoder = decoder or _nvjpeg
        try:
            images = decoder(pieces, device)
        except RuntimeError:  # it does not say which
            return torch.stack([self._one(place, piece, device, decoder) for place, piece in enumerate(pieces)])
        cut = [_cut(image, crop.box, crop.size) for image, crop in zip(images, self.crops, strict=True)]
        return torch.stack(cut)

    def _pieces(self) -> list[Tensor]:
        begins = (0, *self.ends[:-1])
        return [self.data[begin:end] for begin, end in zip(begins, self.ends, strict=True)]

    def _one(self, place: int, piece: Tensor, device: torch.device, decoder: Decoder) -> Tensor:
        """One image by itself; by the host where the device does not know it (CMYK, or no JPEG at all)."""
        crop = self.crops[place]
        try:
            return _cut(decoder([piece], device)[0], crop.box, crop.size)
        except RuntimeError:
            pixels = replace(crop, data=piece.numpy().tobytes()).decode()
            return torch.from_numpy(pixels).to(device)


def _nvjpeg(pieces: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    images: list[Tensor] = decode_jpeg(pieces, mode=ImageReadMode.RGB, device=device)
    return images


def _cut(image: Tensor, box: Box, size: int) -> Tensor:
    """A piece of uint8 [3, height, width] as uint8 [size, size, 3]."""
    top, left, high, wide = box
    piece = image[None, :, top : top + high, left : left + wide].float()
    scaled = torch.nn.functional.interpolate(piece, size=(size, size), mode="bilinear", antialias=True)
    return scaled[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0)
