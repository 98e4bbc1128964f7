"""Measure colours and spectrum of natural photos: what `rendering/colour.py` and `data/spectrum.safetensors` hold.

    python bench/natural_statistics.py PHOTOS

The matrix printed maps three uncorrelated, equally strong colour channels to RGB (before the sigmoid): the square root
of the covariance of the photos' pixels, divided by its longest column. The spectrum is the mean magnitude, per
uncorrelated channel, of the orthonormal real Fourier transform of the photos' logits at 128 × 128 pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

SIZE = 128
OUT = Path(__file__).parents[1] / "src/phosphene/data/spectrum.safetensors"


def read_square(path: Path) -> torch.Tensor:
    """Return the central square of a photo at SIZE pixels, (3, SIZE, SIZE) in [0, 1]."""
    with Image.open(path) as photo:
        rgb = photo.convert("RGB")
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels: torch.Tensor = pil_to_tensor(square)
    return pixels / 255


def main() -> None:
    """Print the colour matrix and write the spectrum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    paths = sorted(parser.parse_args().photos.glob("*.jpg"))
    photos = torch.stack([read_square(path) for path in paths]).double()

    pixels = photos.movedim(1, 0).flatten(1)
    directions, strengths, _ = torch.linalg.svd(torch.cov(pixels))
    root = directions * strengths.sqrt()
    root = root * torch.where(root.sum(0) < 0, -1.0, 1.0) / root.norm(dim=0).max()
    print(f"{len(paths)} photos; uncorrelated channels to RGB:")
    print(root.numpy().round(4))

    logits = photos.clamp(0.02, 0.98).logit()
    channels = torch.einsum("dc,nchw->ndhw", torch.linalg.inv(root), logits)
    centred = channels - channels.mean((-2, -1), keepdim=True)
    magnitude = torch.fft.rfft2(centred, norm="ortho").abs().mean(0)
    OUT.parent.mkdir(exist_ok=True)
    save_file({"magnitude": magnitude.half().contiguous()}, OUT)
    print(f"mean magnitude by distance from the centre: {magnitude[0, 0, 1:64:9].numpy().round(3)}")
    print(OUT)


if __name__ == "__main__":
    main()
