"""Photos: values worked out by hand for every kind of file, and refusals of what is none."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision import models

import phosphene as ph
from phosphene.errors import PhotoRefused
from phosphene.images.photo import MAX_PIXELS, MIDDLE, Fit, decode, read

# two rows of three: red, green, blue / black, grey 51, white
PIXELS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [51, 51, 51], [255, 255, 255]]], np.uint8)
EXPECTED = torch.tensor(
    [
        [[1.0, 0.0, 0.0], [0.0, 0.2, 1.0]],
        [[0.0, 1.0, 0.0], [0.0, 0.2, 1.0]],
        [[0.0, 0.0, 1.0], [0.0, 0.2, 1.0]],
    ]
)[None]


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def assert_reads(path: Path, expected: Tensor, channels: int = 3) -> None:
    image = read(path, channels)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-7)


def refused(path: Path | str, channels: int = 3) -> str:
    with pytest.raises(PhotoRefused) as caught:
        read(path, channels)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tiff", "a.bmp", "a.webp", "wrong_ending.txt"])
def test_a_lossless_file_gives_its_values(tmp_path: Path, name: str) -> None:
    kind = {"a.webp": "WEBP", "wrong_ending.txt": "PNG"}.get(name)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_reads(save(Image.fromarray(PIXELS), tmp_path / name, format=kind, **options), EXPECTED)


def test_a_jpeg_gives_its_values_as_far_as_it_keeps_them(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 8), (255, 102, 0))
    image = read(str(save(flat, tmp_path / "a.jpg", quality=100)))
    torch.testing.assert_close(
        image, torch.tensor([1.0, 0.4, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 16), rtol=0, atol=2 / 255
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_a_photo_is_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    # how an upright photo lies in a file with each EXIF orientation
    stored = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, 1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / f"a.{kind}", exif=exif)
    assert_reads(path, EXPECTED)


def test_a_colour_photo_read_as_grey_weighs_its_channels(tmp_path: Path) -> None:
    path = save(Image.fromarray(PIXELS), tmp_path / "a.png")
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B, in whole bytes
    assert_reads(path, torch.tensor([[76, 150, 29], [0, 51, 255]]).view(1, 1, 2, 3) / 255, channels=1)


def test_grey_of_one_or_eight_bits_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = Image.fromarray(np.array([[0, 51, 255]], np.uint8))
    row = torch.tensor([0, 0.2, 1.0]).view(1, 1, 1, 3)
    assert_reads(save(grey, tmp_path / "a.png"), row.expand(1, 3, 1, 3))
    assert_reads(save(grey, tmp_path / "a.png"), row, channels=1)
    black_and_white = save(grey.point(lambda value: 255 * (value > 40)).convert("1"), tmp_path / "b.png")
    assert_reads(black_and_white, torch.tensor([0, 1.0, 1.0]).view(1, 1, 1, 3), channels=1)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_of_grey_keep_their_precision(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 1, 257], [13107, 65534, 65535]], np.uint16)
    expected = torch.tensor([[0, 1 / 65535, 1 / 255], [0.2, 65534 / 65535, 1]]).view(1, 1, 2, 3)
    path = save(Image.fromarray(values), tmp_path / f"a.{kind}")
    assert_reads(path, expected, channels=1)
    assert_reads(path, expected.expand(1, 3, 2, 3))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_thirty_two_bits_a_channel_are_refused(tmp_path: Path, mode: str) -> None:
    path = save(Image.new(mode, (2, 2), 3), tmp_path / "a.tiff")
    assert refused(path).endswith("has 32 bits a channel, of unknown range; save it with 8 or 16")


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 51, 0, 102, 255])
    image.putpixel((1, 0), 1)
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.4], [0.2, 1.0]]).view(1, 3, 1, 2)
    assert_reads(save(image, tmp_path / "a.png"), expected)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    for column, colour in enumerate([(255, 0, 0, 255), (0, 0, 0, 102), (7, 8, 9, 0)]):
        image.putpixel((column, 0), colour)
    # opaque red; black over white at 0.4: 1 - 0.4; nothing at all
    expected = torch.tensor([[1, 0.6, 1], [0, 0.6, 1], [0, 0.6, 1]]).view(1, 3, 1, 3)
    assert_reads(save(image, tmp_path / "a.png"), expected)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 51, 0, 102, 255])
    palette.putpixel((1, 0), 1)
    path = save(palette, tmp_path / "b.png", transparency=1)
    assert_reads(path, torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.2, 1.0]]).view(1, 3, 1, 2))
    veiled = Image.new("LA", (1, 1), (0, 102))
    assert_reads(save(veiled, tmp_path / "c.png"), torch.tensor(0.6).view(1, 1, 1, 1), channels=1)


def test_inks_become_light(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (3, 1))
    for column, ink in enumerate([(255, 0, 0, 0), (0, 0, 0, 204), (0, 255, 255, 0)]):
        inks.putpixel((column, 0), ink)
    expected = torch.tensor([[0, 0.2, 1], [1, 0.2, 0], [1, 0.2, 0]]).view(1, 3, 1, 3)
    assert_reads(save(inks, tmp_path / "a.tiff"), expected)


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff", "png"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "webp" else {}
    path = save(frames[0], tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert_reads(path, torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 3, 4).contiguous())


def test_what_is_no_photo_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("I am no image, whatever I am called")
    (tmp_path / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert refused(tmp_path / "none.jpg") == f"there is no photo {tmp_path / 'none.jpg'}"
    assert refused(tmp_path) == f"{tmp_path} is a folder, not a photo"
    assert refused(tmp_path / "empty.jpg") == f"{tmp_path / 'empty.jpg'} is empty (0 bytes)"
    for name in ("text.jpg", "program.jpg"):  # Pillow would hand the second to Ghostscript
        assert refused(tmp_path / name).endswith(
            "is no image that can be read; give a JPEG, PNG, WebP, GIF, TIFF or BMP"
        )
    assert "Not a directory" in refused(tmp_path / "text.jpg" / "a.jpg")
    assert "cannot be read" in refused("null\0byte.jpg")
    assert "a photo has 3 channels or 1; this network sees 7" in refused(tmp_path / "none.jpg", channels=7)


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "bmp", "webp"])
def test_a_file_cut_short_is_refused_rather_than_filled_with_grey(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"a.{kind}")
    read(path)
    whole = path.read_bytes()
    for tenths in range(1, 10):
        path.write_bytes(whole[: len(whole) * tenths // 10])
        assert "is no image that can be read" in (message := refused(path)) or "cut short" in message
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def png(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 8_001), (16_000, 12_000), (1_000_000, 1_000_000)])
@pytest.mark.parametrize("limited", [True, False])
def test_a_decompression_bomb_is_refused_before_it_unpacks(
    tmp_path: Path, size: tuple[int, int], limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    if not limited:  # as programs do that want no limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    tracemalloc.start()
    unpacked: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: unpacked.append(image))
    try:
        message = refused(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert message == f"{path} unpacks to more than 80 million pixels, which is refused; make it smaller"
    assert not unpacked


def test_a_small_file_made_the_same_way_as_the_bomb_does_unpack(tmp_path: Path) -> None:
    (tmp_path / "small.png").write_bytes(png(3, 9))  # 9 rows of 1 + 3·3 bytes are 90 of its 99
    assert_reads(tmp_path / "small.png", torch.zeros(1, 3, 9, 3))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tiff", "a.bmp", "a.webp", "a.jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_give_what_their_file_gives(tmp_path: Path, name: str, channels: int) -> None:
    path = save(Image.fromarray(PIXELS), tmp_path / name)
    for max_side in (None, 3, 1024):  # no more than it has
        assert torch.equal(decode(path.read_bytes(), channels, max_side=max_side), read(path, channels))


def test_bytes_that_are_no_photo_are_refused_with_the_reason() -> None:
    def refused_bytes(content: bytes, **options: Any) -> str:
        with pytest.raises(PhotoRefused) as caught:
            decode(content, **options)
        return str(caught.value)

    assert refused_bytes(b"") == "the photo is empty (0 bytes)"
    assert refused_bytes(b"I am no image") == (
        "the photo is no image that can be read; give a JPEG, PNG, WebP, GIF, TIFF or BMP"
    )
    assert refused_bytes(png(20, 10)).startswith("the photo cannot be read, it may be damaged or cut short: ")
    assert refused_bytes(b"", channels=7) == "a photo has 3 channels or 1; this network sees 7"
    for size in ((2000, 1001), (1_000_000, 1_000_000)):
        assert refused_bytes(png(*size), max_pixels=2_000_000) == (
            "the photo unpacks to more than 2 million pixels, which is refused; make it smaller"
        )


HALVES = np.repeat(np.array([[0, 255]], np.uint8), 200, 1).repeat(100, 0)  # 100 × 400, black on the left


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "RGBA", "LA", "I;16"])
def test_a_large_photo_is_shrunk_whatever_its_mode(mode: str) -> None:
    image = Image.fromarray(HALVES.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(HALVES).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    small = decode(buffer.getvalue(), max_side=40)
    assert tuple(small.shape) == (1, 3, 10, 40)
    assert float(small.min()) >= 0
    assert float(small.max()) <= 1
    dark, bright = small[..., :17], small[..., 23:]  # apart from where the resampling reaches over the edge
    assert float(dark.max()) <= 0.01
    assert float(bright.min()) >= 0.99
    # and smoothed: a column of the middle is neither
    assert tuple(decode(buffer.getvalue(), 1, max_side=40).shape) == (1, 1, 10, 40)


def test_what_is_shrunk_is_the_mean_of_what_was_there() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    small = decode(buffer.getvalue(), max_side=32)
    blocks = torch.from_numpy(noise).double().view(16, 16, 32, 16, 3).mean((1, 3)).permute(2, 0, 1) / 255
    assert tuple(small.shape) == (1, 3, 16, 32)
    assert torch.corrcoef(torch.stack([small.double().flatten(), blocks.flatten()]))[0, 1] > 0.8
    assert float(small.mean()) == pytest.approx(float(blocks.mean()), abs=0.003)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_what_is_shrunk_is_turned_upright_too(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise makes it upright: what is left comes to the top
    buffer = io.BytesIO()
    Image.fromarray(HALVES).convert("RGB").save(buffer, kind, exif=exif)
    small = decode(buffer.getvalue(), max_side=40)
    assert tuple(small.shape) == (1, 3, 40, 10)
    assert float(small[..., :17, :].max()) < 0.1 < 0.9 < float(small[..., 23:, :].min())


def test_a_large_jpeg_is_not_unpacked_at_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.fromarray(HALVES).resize((4000, 3000)).save(buffer, "JPEG")
    sizes: list[tuple[int, int]] = []
    original = ImageFile.ImageFile.load

    def load(image: ImageFile.ImageFile) -> Any:
        sizes.append(image.size)
        return original(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert tuple(decode(buffer.getvalue(), max_side=250).shape) == (1, 3, 188, 250)
    assert max(width for width, _ in sizes) <= 1000


def ramp(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(300, 451), (451, 300), (256, 256), (100, 700), (60, 60)])
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "inception_v3", "vit_b_16"])
def test_a_photo_is_fitted_as_torchvision_does(name: str, size: tuple[int, int]) -> None:
    preset = models.get_model_weights(name).DEFAULT.transforms()
    fit = Fit(preset.resize_size[0], preset.interpolation.value)
    photo, crop = ramp(*size), preset.crop_size[0]
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (preset.mean, preset.std))
    expected = (preset(photo) * std + mean).clamp(0, 1)  # which only bicubic resizing leaves
    assert torch.allclose(fit(photo, (crop, crop))[0], expected, atol=1e-5)


def test_the_region_is_the_part_of_the_photo_that_is_seen() -> None:
    # 100 × 200 at short side 50 is 50 × 100; the middle 40 × 40 starts at 5, 30, which is 10, 60 of the photo
    image, region = Fit(50)(ramp(100, 200), (40, 40))
    assert tuple(image.shape) == (1, 3, 40, 40)
    assert region == (10, 60, 80, 80)
    assert MIDDLE(ramp(100, 200), (40, 40))[1] == (0, 50, 100, 100)
    assert Fit(squash=True)(ramp(100, 200), (40, 40))[1] == (0, 0, 100, 200)
    assert MIDDLE(ramp(100, 200), (40, 60))[1] == (0, 25, 100, 150)


def test_a_photo_smaller_than_the_input_is_enlarged_to_cover_it() -> None:
    image, region = Fit(30)(ramp(10, 20), (40, 40))
    assert tuple(image.shape) == (1, 3, 40, 40)
    assert region == (0, 5, 10, 10)


def test_squashing_keeps_the_whole_photo() -> None:
    photo = torch.tensor([[[[0.0, 1.0], [0.25, 0.75]]]])
    image, _ = Fit(squash=True, interpolation="nearest")(photo, (2, 4))
    assert image.tolist() == [[[[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75]]]]
    unchanged, _ = Fit(squash=True)(photo, (2, 2))
    assert torch.equal(unchanged, photo)


def test_a_network_is_loaded_with_its_own_fit() -> None:
    assert ph.load("torchvision/squeezenet1_1", weights="none").fit == Fit(256, "bilinear")
    assert ph.load("timm/mobilenetv3_small_050", weights="none").fit == Fit(256, "bicubic")
    assert ph.load("builtin/efficientnet-lite0").fit == Fit(256, "bicubic")
    assert ph.load("builtin/vgg19").fit == MIDDLE
