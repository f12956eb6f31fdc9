"""Images that the device decodes are those that the host would have cut."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dltrain.data.batch import Batch
from dltrain.data.dataset import open_dataset
from dltrain.data.decode import EncodedCrop, decode_crop, decode_label, encode_crop
from dltrain.data.encoded import EncodedCrops, lacks_decoder
from dltrain.data.image import jpeg_pixels
from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.sample import BadSample, Sample
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError

CPU = torch.device("cpu")
SIZE = 48


def photo(number: int, mode: str = "RGB", quality: int = 95) -> bytes:
    """Smooth, so that two decoders and two resamplers agree closely."""
    height, width = 90 + number, 140 - number
    down, across = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(down / (20 + number + plane) + across / (30 - plane)) for plane in range(len(mode))]
    buffer = io.BytesIO()
    pixels = np.stack(planes, -1).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sample(number: int, data: bytes | None = None) -> Sample:
    return Sample(f"{number:03d}", {"jpg": data or photo(number)}, "memory://photos/shard.tar")


def by_torch(pieces: list[Tensor], device: torch.device) -> list[Tensor]:
    """What nvJPEG does, on the host: whole images, and one error for all."""
    try:
        pixels = [jpeg_pixels(piece.numpy().tobytes()) for piece in pieces]
    except (ValueError, OSError) as error:
        raise RuntimeError(str(error)) from None
    if any(image.ndim != 3 for image in pixels):
        raise RuntimeError("unsupported")
    return [torch.from_numpy(image).permute(2, 0, 1).to(device) for image in pixels]


def crops(random: bool, count: int = 6) -> tuple[list[EncodedCrop], np.ndarray[Any, Any]]:
    def seeded(number: int) -> np.random.Generator | None:
        return np.random.default_rng(number) if random else None

    encoded = [encode_crop(sample(number), "jpg", SIZE, seeded(number)) for number in range(count)]
    return encoded, np.stack([decode_crop(sample(number), "jpg", SIZE, seeded(number)) for number in range(count)])


def agree(pixels: Tensor, expected: np.ndarray[Any, Any]) -> None:
    assert pixels.dtype == torch.uint8
    assert pixels.shape == expected.shape
    apart = np.abs(pixels.cpu().numpy().astype(int) - expected.astype(int))
    assert apart.mean() < 1.5
    assert np.percentile(apart, 99) <= 6


@pytest.mark.parametrize("random", [True, False], ids=["random pieces", "middle"])
def test_the_device_cuts_what_the_host_would(random: bool) -> None:
    encoded, expected = crops(random, 40)  # more than are decoded at once
    packed = EncodedCrops.pack(encoded)
    agree(packed.to(CPU, decoder=by_torch), expected)
    agree(packed[2:5].to(CPU, decoder=by_torch), expected[2:5])
    np.testing.assert_array_equal(np.stack([crop.decode() for crop in encoded]), expected)


def test_what_the_device_does_not_know_the_host_decodes() -> None:
    samples = [sample(0), sample(1, photo(1, "CMYK")), sample(2, photo(2, "L"))]
    packed = EncodedCrops.pack([encode_crop(one, "jpg", SIZE) for one in samples])
    agree(packed.to(CPU, decoder=by_torch), np.stack([decode_crop(one, "jpg", SIZE) for one in samples]))


def test_a_broken_image_is_named() -> None:
    broken = photo(1)[: len(photo(1)) // 2]
    packed = EncodedCrops.pack([encode_crop(sample(0), "jpg", SIZE), encode_crop(sample(1, broken), "jpg", SIZE)])
    with pytest.raises(BadSample, match=r"cannot decode field 'jpg' of memory://photos/shard.tar#001"):
        packed.to(CPU, decoder=by_torch)
    with pytest.raises(BadSample, match="#002"):
        encode_crop(sample(2, b"no image"), "jpg", SIZE)


def test_sizes_that_differ_are_told() -> None:
    with pytest.raises(UserError, match=r"#001 is cut to 32 pixels, .*#000 to 48; make them equal"):
        EncodedCrops.pack([encode_crop(sample(0), "jpg", 48), encode_crop(sample(1), "jpg", 32)])


def cut(one: Sample, random: np.random.Generator | None) -> dict[str, Any]:
    return {"image": encode_crop(one, "jpg", SIZE, random), "cls": decode_label(one, 10)}


@pytest.fixture
def photos(tmp_path: Path) -> str:
    with ShardWriter(str(tmp_path / "photos"), samples_per_shard=8) as writer:
        for number in range(20):
            writer.write(f"{number:03d}", {"jpg": photo(number), "cls": str(number % 10).encode()})
    return str(tmp_path / "photos")


def batches(url: str, encoded: bool, workers: int = 0) -> list[Batch]:
    dataset = open_dataset(url)
    loader = Loader(dataset, Order(dataset.shard_sizes), cut, global_batch_size=8, augment=True, workers=workers)
    loader._fetch.encoded = encoded  # what a GPU with nvJPEG would have it be
    return [batch for batch, _ in zip(loader, range(3), strict=False)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_travel_encoded_only_where_the_device_decodes(photos: str, workers: int) -> None:
    for whole, later in zip(batches(photos, False), batches(photos, True, workers), strict=True):
        assert not whole.encoded
        assert later.fields.keys() == {"cls"}
        assert later.keys == whole.keys
        crops = later.encoded["image"]
        agree(crops.to(CPU, decoder=by_torch), whole.fields["image"].numpy())
        parts = [piece.encoded["image"].to(CPU, decoder=by_torch) for piece in later.split(3)]
        assert torch.equal(torch.cat(parts), crops.to(CPU, decoder=by_torch))


def test_what_is_no_fault_of_an_image_is_told() -> None:
    def short_of_memory(pieces: list[Tensor], device: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        EncodedCrops.pack(crops(False)[0]).to(CPU, decoder=short_of_memory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without CUDA")
def test_a_torchvision_that_cannot_is_found_by_trying() -> None:
    assert "torchvision does not decode on it" in lacks_decoder(torch.device("cuda"))


def test_without_a_gpu_the_host_decodes(photos: str) -> None:
    assert lacks_decoder(CPU) == "there is no GPU"
    dataset = open_dataset(photos)
    loader = Loader(dataset, Order(dataset.shard_sizes), cut, global_batch_size=8, decode="device", device=CPU)
    assert next(iter(loader)).fields["image"].shape == (8, SIZE, SIZE, 3)


def test_one_field_is_encoded_in_all_samples_or_in_none(photos: str) -> None:
    def mixed(one: Sample, random: np.random.Generator | None) -> dict[str, Any]:
        crop = encode_crop(one, "jpg", SIZE, random)
        return {"image": crop.decode() if int(one.key) % 2 else crop}

    dataset = open_dataset(photos)
    loader = Loader(dataset, Order(dataset.shard_sizes), mixed, global_batch_size=8)
    loader._fetch.encoded = True
    with pytest.raises(UserError, match=r"field 'image' is still encoded in .* and decoded in .*; make them equal"):
        next(iter(loader))


@pytest.mark.gpu
def test_nvjpeg_gives_the_same_batches(photos: str) -> None:
    device = torch.device("cuda")
    reason = lacks_decoder(device)
    if reason:
        pytest.skip(f"needs nvJPEG: {reason}")
    dataset = open_dataset(photos)
    order = Order(dataset.shard_sizes)
    loader = Loader(dataset, order, cut, global_batch_size=8, augment=True, decode="device", device=device)
    for whole, moved in zip(batches(photos, False), loader, strict=False):
        assert moved.fields["image"].device.type == "cuda"
        agree(moved.fields["image"], whole.fields["image"].numpy())
    odd = [sample(0), sample(1, photo(1, "CMYK")), sample(2, photo(2, "L"))]
    packed = EncodedCrops.pack([encode_crop(one, "jpg", SIZE) for one in odd])
    agree(packed.to(device), np.stack([decode_crop(one, "jpg", SIZE) for one in odd]))
