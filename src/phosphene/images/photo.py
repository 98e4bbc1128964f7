"""Photos: reading them, and fitting them to the input size of a network."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from phosphene.errors import PhotoRefused

MAX_PIXELS = 80_000_000
# Pillow reads more formats; for one of them, EPS, it would run a PostScript interpreter
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK")  # modes whose numbers may be averaged as they are
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp")  # of files in a folder of photos


def read(path: str | Path, channels: int = 3) -> Tensor:
    """Return a photo as (1, c, h, w) float32 in [0, 1], turned upright as its EXIF entry says.

    `channels` is 3 for RGB or 1 for grey. Transparent parts are laid on white. Of several frames the first is read.
    16 bits of grey keep their precision; colour is read with 8 bits a channel.

    Raises:
        PhotoRefused: the file is missing, empty, no image, cut short, or so large that it may be an attack.
    """
    file = Path(path)
    check_channels(channels)
    with refusing_bad_files(file, MAX_PIXELS):
        if file.is_dir():
            raise PhotoRefused(f"{file} is a folder, not a photo")
        if file.stat().st_size == 0:
            raise empty_error(file)
        return decoded_image(file, file, channels, MAX_PIXELS, None)


def decode(content: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS, max_side: int | None = None) -> Tensor:
    """Return the photo of an image file's bytes, as `read` returns a file's.

    Args:
        max_pixels: the most that the photo may have, by its header.
        max_side: pixels of the longer side at most; a larger photo is shrunk before it becomes floating point.

    Raises:
        PhotoRefused: as `read`.
    """
    check_channels(channels)
    with refusing_bad_files("the photo", max_pixels):
        if not content:
            raise empty_error("the photo")
        return decoded_image("the photo", io.BytesIO(content), channels, max_pixels, max_side)


def check_channels(channels: int) -> None:
    """Refuse a number of channels that no image file has."""
    if channels not in (1, 3):
        raise PhotoRefused(f"a photo has 3 channels or 1; this network sees {channels}")


@contextmanager
def refusing_bad_files(name: str | Path, max_pixels: int) -> Iterator[None]:
    """Turn the errors of reading a photo into a sentence."""
    try:
        yield
    except PhotoRefused:
        raise
    except UnidentifiedImageError as error:
        raise PhotoRefused(f"{name} is no image that can be read; give a JPEG, PNG, WebP, GIF, TIFF or BMP") from error
    except Image.DecompressionBombError as error:
        raise too_large_error(name, max_pixels) from error
    except FileNotFoundError as error:
        raise PhotoRefused(f"there is no photo {name}") from error
    except Exception as error:  # a damaged file may raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PhotoRefused(f"{name} cannot be read, it may be damaged or cut short: {reason}") from error


def decoded_image(
    name: str | Path, source: Path | io.BytesIO, channels: int, max_pixels: int, max_side: int | None
) -> Tensor:
    """Return the pixels of an image file (1, c, h, w) in [0, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd files; the size is checked here
        with Image.open(source, formats=FORMATS) as image:
            check_size(name, image, max_pixels)
            if image.mode in AVERAGED:
                shrink(image, max_side)  # before it is copied; a JPEG is not even unpacked at its full size
            return to_tensor(name, image, channels, max_side)


def check_size(name: str | Path, image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a decompression bomb by the size in its header, before anything is unpacked."""
    if image.width * image.height > max_pixels:
        raise too_large_error(name, max_pixels)


def too_large_error(name: str | Path, max_pixels: int) -> PhotoRefused:
    millions = max_pixels // 1_000_000
    return PhotoRefused(f"{name} unpacks to more than {millions} million pixels, which is refused; make it smaller")


def empty_error(name: str | Path) -> PhotoRefused:
    return PhotoRefused(f"{name} is empty (0 bytes)")


def to_tensor(name: str | Path, image: Image.Image, channels: int, max_side: int | None = None) -> Tensor:
    """Return the pixels of an opened image (1, c, h, w) in [0, 1], shrunk to the longest side allowed."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise PhotoRefused(f"{name} has 32 bits a channel, of unknown range; save it with 8 or 16")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        levels = shrink(upright.convert("I"), max_side) if max_side else upright
        grey = torch.from_numpy(np.asarray(levels).astype(np.float32)).clamp(0, 65535) / 65535
        return grey.expand(1, channels, -1, -1).contiguous()
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    converted = shrink(upright.convert("RGB" if channels == 3 else "L"), max_side)
    pixels = torch.from_numpy(np.array(converted)).to(torch.float32) / 255
    return pixels.view(1, converted.height, converted.width, channels).permute(0, 3, 1, 2).contiguous()


def shrink(image: Image.Image, max_side: int | None) -> Image.Image:
    """Shrink an image in place, with smoothing, if its longer side exceeds `max_side`, and return it."""
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return image


class Region(NamedTuple):
    """A part of a photo, in its pixels; borders may lie between pixels."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Fit:
    """How a photo is fitted to a network's input size.

    Its short side is resized to `resize` pixels (None: just enough to cover the input) and the middle cut out; with
    `squash` the whole photo is resized to the input size, even if that changes its proportions. `interpolation` is
    `bilinear`, `bicubic` or `nearest`; photos are smoothed before they shrink.
    """

    resize: int | None = None
    interpolation: str = "bilinear"
    squash: bool = False

    def __call__(self, photo: Tensor, size: tuple[int, int]) -> tuple[Tensor, Region]:
        """Return the photo (1, c, h, w) at `size` (h, w), values in [0, 1], and the part of it that remains."""
        height, width = photo.shape[-2:]
        if self.squash:
            return self.scale(photo, size), Region(0.0, 0.0, float(height), float(width))
        covering = max(size[0] / height, size[1] / width)
        scale = covering if self.resize is None else max(covering, self.resize / min(height, width))
        # as in torchvision: the long side is rounded down, the border of the middle to the nearest
        tall, wide = (max(int(side * scale + 1e-6), least) for side, least in zip((height, width), size, strict=True))
        top, left = round((tall - size[0]) / 2), round((wide - size[1]) / 2)
        middle = self.scale(photo, (tall, wide))[..., top : top + size[0], left : left + size[1]]
        down, right = height / tall, width / wide
        return middle, Region(top * down, left * right, size[0] * down, size[1] * right)

    def scale(self, photo: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the photo at a size; bicubic overshoot is clipped."""
        if tuple(photo.shape[-2:]) == size:
            return photo
        if self.interpolation == "nearest":
            return F.interpolate(photo, size, mode="nearest-exact")
        return F.interpolate(photo, size, mode=self.interpolation, antialias=True).clamp(0, 1)


MIDDLE = Fit()
