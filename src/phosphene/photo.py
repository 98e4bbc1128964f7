"""Reading photos."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from phosphene.errors import PhotoRefused


def read(path: str | Path, channels: int = 3) -> Tensor:
    """Return a photo as (1, c, h, w) float32 in [0, 1], turned upright as its EXIF entry says.

    `channels` is 3 for RGB or 1 for grey.

    Raises:
        PhotoRefused: the file is missing, empty, no image, cut short, or so large that it is taken for an attack.
    """
    file = Path(path)
    if not file.is_file():
        raise PhotoRefused(f"there is no photo {file}" if not file.exists() else f"{file} is a folder, not a photo")
    if file.stat().st_size == 0:
        raise PhotoRefused(f"{file} is empty (0 bytes)")
    if channels not in (1, 3):
        raise PhotoRefused(f"a photo has 3 channels or 1; this network sees {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise PhotoRefused(f"{file} is no image that can be read; give a JPEG, PNG, WebP, GIF, TIFF or BMP") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise PhotoRefused(
            f"{file} unpacks to more than {limit} million pixels, which is refused; make it smaller"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise PhotoRefused(f"{file} is damaged or cut short: {error}") from error
    image: Tensor = pil_to_tensor(upright).to(torch.float32) / 255
    return image[None]
