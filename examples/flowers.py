"""Seventeen kinds of flowers: drawn ones, or photos from a folder."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

SIDE = 224
# of each kind of flower: petals, how thin and how notched they are, colour, radius and colour of the middle
YELLOW, WHITE, VIOLET = (0.98, 0.83, 0.12), (0.95, 0.95, 0.93), (0.55, 0.32, 0.78)
KINDS = (
    (6, 0.6, 0.0, YELLOW, 0.34, (0.95, 0.50, 0.08)),
    (3, 1.4, 0.0, WHITE, 0.12, (0.45, 0.65, 0.25)),
    (6, 0.3, 0.3, WHITE, 0.10, (0.85, 0.85, 0.45)),
    (5, 1.2, 0.0, (0.30, 0.34, 0.86), 0.10, (0.30, 0.30, 0.60)),
    (6, 0.7, 0.0, VIOLET, 0.16, (0.98, 0.66, 0.10)),
    (3, 0.4, 0.3, (0.36, 0.28, 0.78), 0.22, (0.96, 0.84, 0.30)),
    (6, 1.6, 0.0, (0.96, 0.45, 0.10), 0.14, (0.45, 0.16, 0.06)),
    (3, 0.2, 0.0, (0.88, 0.12, 0.18), 0.12, (0.15, 0.10, 0.10)),
    (4, 0.3, 0.0, (0.58, 0.12, 0.34), 0.16, (0.85, 0.78, 0.50)),
    (17, 0.5, 0.0, YELLOW, 0.48, (0.30, 0.18, 0.08)),
    (15, 0.6, 0.0, WHITE, 0.30, (0.97, 0.80, 0.12)),
    (23, 1.2, 0.0, YELLOW, 0.24, (0.92, 0.62, 0.05)),
    (29, 0.4, 0.4, YELLOW, 0.06, (0.80, 0.60, 0.08)),
    (5, 0.5, 0.5, (0.96, 0.92, 0.50), 0.16, (0.93, 0.70, 0.20)),
    (5, 0.2, 0.0, YELLOW, 0.20, (0.66, 0.70, 0.12)),
    (7, 0.8, 0.0, (0.96, 0.72, 0.84), 0.16, (0.88, 0.84, 0.30)),
    (5, 0.3, 0.2, VIOLET, 0.45, (0.16, 0.06, 0.20)),
)
CLASSES = len(KINDS)


class Flowers(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (n, h, w, 3), uint8, and their classes, as the networks want them: in [0, 1]."""

    def __init__(self, pictures: Tensor, classes: Tensor) -> None:
        self.pictures, self.classes, self.channels_last = pictures, classes, False

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        pictures = self.pictures[batch].float() / 255
        return pictures if self.channels_last else pictures.permute(0, 3, 1, 2), self.classes[batch]


def batches(flowers: Flowers, shuffle: bool = False, size: int = 64) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader whose batches are cut out of the set whole, which is faster than picture by picture."""
    order = RandomSampler(flowers) if shuffle else SequentialSampler(flowers)
    return DataLoader(flowers, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))


def split(pictures: Tensor, classes: Tensor) -> tuple[Flowers, Flowers]:
    """Return pictures to train with, and every fifth of each class to test with; the classes lie in order."""
    held = (torch.arange(len(classes)) - torch.searchsorted(classes, classes)) % 5 == 4
    return Flowers(pictures[~held], classes[~held]), Flowers(pictures[held], classes[held])


def photos(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the photos in a folder, (n, 224, 224, 3), uint8, cut to a square, and their classes."""
    files = sorted(folder.glob("jpg/image_*.jpg"))  # the original archive: 17 x 80, in order
    classes = [number // 80 for number in range(len(files))]
    if not files:
        folders = sorted(path for path in folder.glob("*") if path.is_dir())
        photos = [
            (path, number)
            for number, class_folder in enumerate(folders)
            for path in sorted(class_folder.glob("*.[jp][pn]*g"))
        ]
        files, classes = [path for path, _ in photos], [number for _, number in photos]
    if len(set(classes)) != CLASSES:
        sys.exit(f"{folder} has photos of {len(set(classes))} classes, and the network is for {CLASSES}: give the "
                 "folder that holds jpg/image_0001.jpg and so on, or one with a folder for each class")  # fmt: skip
    whole = torch.empty(len(files), SIDE, SIDE, 3, dtype=torch.uint8)
    for place, file in zip(whole, files, strict=True):
        square = ImageOps.fit(Image.open(file).convert("RGB"), (SIDE, SIDE))
        place.copy_(torch.from_numpy(np.array(square)))
    return whole, torch.tensor(classes)


def drawn(each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return so many drawn pictures of each kind, (n, 224, 224, 3), uint8, and their classes."""
    random = torch.Generator().manual_seed(seed)
    classes = torch.arange(CLASSES).repeat_interleave(each)
    return torch.cat([draw(part, random) for part in classes.split(32)]), classes


def draw(classes: Tensor, random: torch.Generator) -> Tensor:
    """Return a picture of each class: two or three flowers in a meadow, in some light."""
    count = len(classes)

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=random)

    def spots(down: int, across: int) -> Tensor:
        return F.interpolate(torch.rand(count, 1, down, across, generator=random), (SIDE, SIDE), mode="bilinear")

    grass = ((0.6 * spots(6, 6) + 0.3 * spots(5, 64) + 0.1 * spots(60, 60) - 0.3) / 0.4).clamp(0, 1)
    green = torch.tensor([0.22, 0.40, 0.14]).view(3, 1, 1) + between(0, 0.2, 3)
    pictures = green * (0.3 + 0.8 * grass)
    petals, thin, notch, colour, middle, core = (
        torch.tensor([KINDS[kind][part] for kind in classes.tolist()]).float().view(count, -1, 1, 1)
        for part in range(6)
    )
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    for size, aside in ((between(24, 40) * (between(-1, 1) > 0), 70), (between(28, 48), 70), (between(68, 96), 24)):
        right, down = (place - SIDE / 2 - between(-aside, aside) for place in (x, y))
        turn = between(0, math.pi)
        along, across = right * turn.cos() + down * turn.sin(), down * turn.cos() - right * turn.sin()
        across = across / between(0.65, 1)  # seen from the side
        far = torch.hypot(along, across) / size.clamp(min=1e-3)  # 1 where the longest petals end
        ridge = (torch.atan2(across, along) * petals / 2 + turn).cos().abs()  # 1 along the middle of a petal
        edge = (0.3 + 0.7 * ridge**thin) * (1 - notch * ridge**12)
        petal, heart, shadow = (
            (gap * steep + 0.5).clamp(0, 1) * (size > 0)
            for gap, steep in ((edge - far, size), (middle - far, size), (edge - far, 4))
        )
        tint = colour * between(0.9, 1.1, 3)
        flower = tint * (0.6 + 0.4 * ridge) * (0.7 + 0.3 * (far / edge).clamp(0, 1))
        flower = torch.lerp(flower, core * (0.85 + 0.15 * (far * size).sin()), heart)
        pictures = torch.lerp(pictures * (1 - 0.5 * shadow), flower, petal)
    pictures = pictures * between(0.75, 1.1) + 0.02 * torch.randn(pictures.shape, generator=random)
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
