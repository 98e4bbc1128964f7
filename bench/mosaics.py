"""Where does the heat lie? 2×2 mosaics of photos: `python bench/mosaics.py FOLDER [--method gradcam] [--layer …]`.

Each mosaic holds one photo that the network is sure of (probability above 0.9) and three of other classes, each at the
network's input size, so that the mosaic has twice its sides. Explained is the class of the first, whose cell goes round
the four corners. Printed are two figures over 40 mosaics:

    energy   share of the positive heat that lies in the right cell (chance 0.25), the mean over mosaics
    peak     in how many mosaics the greatest heat lies in the right cell

The map is enlarged to the mosaic as an overlay does. Photos are the first of the folder by name, one a class; a
mosaic's four are a quarter of the list apart, lest they be of kindred classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import phosphene as ph
from phosphene.inspection.explain import explaining
from phosphene.network.model import Model

SURE = 0.9


class Sample(NamedTuple):
    """A photo as the network takes it (1, c, h, w), and the class that it is sure of."""

    image: Tensor
    target: int


def sure_photos(model: Model, folder: Path, wanted: int) -> list[Sample]:
    """Return the first photos of a folder that the network gives one class a probability above 0.9, one a class."""
    samples: dict[int, Sample] = {}
    with model.reading([model.logits]) as read, torch.no_grad():
        for path in sorted(folder.glob("*.jpg")):
            image, _ = model.fitted(ph.read(path, model.channels_in))
            chance, target = read(image)[model.logits].softmax(1)[0].max(0)
            if chance > SURE:
                samples.setdefault(int(target), Sample(image, int(target)))
            if len(samples) == wanted:
                break
    return list(samples.values())


def mosaic(samples: list[Sample], number: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the mosaic (1, c, 2 h, 2 w) of photo `number` and three others, and the first one's cell (row, column)."""
    apart = len(samples) // 4
    chosen = [samples[(number + step * apart) % len(samples)].image for step in range(4)]
    place = number % 4
    cells = chosen[4 - place :] + chosen[: 4 - place]
    return torch.cat([torch.cat(cells[:2], 3), torch.cat(cells[2:], 3)], 2), divmod(place, 2)


def measure(heat: Tensor, cell: tuple[int, int], size: tuple[int, int]) -> tuple[float, bool]:
    """Return of a map (h, w) the share of its positive heat that lies in a cell, and whether its peak does."""
    large = F.interpolate(heat.relu()[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    height, width = size[0] // 2, size[1] // 2
    top, left = cell[0] * height, cell[1] * width
    inside = large[top : top + height, left : left + width]
    return float(inside.sum() / large.sum()), bool(inside.max() == large.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="builtin/efficientnet-lite0")
    parser.add_argument("--layer")
    parser.add_argument("--method", default="gradcam")
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    model = ph.load(options.model)
    samples = sure_photos(model, options.folder, options.count)
    with explaining(model, options.layer, options.method) as explainer:
        layer = explainer.spec["layer"]
        figures = []
        for number, sample in enumerate(samples):
            image, cell = mosaic(samples, number)
            maps, _ = explainer.maps(image, sample.target)
            figures.append(measure(maps[0], cell, (image.shape[-2], image.shape[-1])))
    energy, peaks = (sum(column) for column in zip(*figures, strict=True))
    print(
        f"{options.model} {layer} {options.method}: energy {energy / len(figures):.3f}, peak {peaks} of {len(figures)}"
    )


if __name__ == "__main__":
    main()
