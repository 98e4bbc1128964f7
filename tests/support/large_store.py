"""Stores of any number of filters, made quickly: complete atlases whose pictures were not rendered.

The plan, the entries, the evidence and the verdicts are the real ones; only `render_job` is replaced, by pictures of a
few waves and by measurements that a network could have made on them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.atlases.job_film import JobFilm, film_tile
from phosphene.atlases.plan import Job, atlas
from phosphene.atlases.render_job import files_of, manifest_of, with_film
from phosphene.atlases.run import Summary, run
from phosphene.atlases.runners.pool import Outcome
from phosphene.atlases.verdicts import Measurements
from phosphene.images.display import DISPLAYS
from phosphene.images.grid import picture
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.objectives import channel
from phosphene.rendering.result import Rendered

WIDE = (64, 128, 256, 512, 1024, 2048, *(512,) * 31, 96)  # 20,000 filters, one layer of 2,048
NARROW = (6, 40)
SMALLER = 4  # pictures of noise behind all others
MOMENTS = (0, 2, 8)  # steps before the last that a film shows


def net(widths: Sequence[int]) -> nn.Sequential:
    """Return convolutions of so many filters each, the first three 3×3 and the others 1×1, seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            convolution = nn.Conv2d(before, width, 3 if number < 3 else 1, padding=1 if number < 3 else 0)
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.ReLU(), *([nn.MaxPool2d(2)] if number < 3 else [])]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


def wide() -> nn.Module:
    """Return the network of 20,000 filters, as `large_store:wide`."""
    return net(WIDE)


def narrow() -> nn.Module:
    """Return a network of two layers, as `large_store:narrow`."""
    return net(NARROW)


def waves(numbers: Iterable[int], size: int) -> Tensor:
    """Return pictures (n, 3, size, size) in [0, 1] that differ by their number: coloured waves with a little noise."""
    generator = torch.Generator().manual_seed(0)
    grain = 0.06 * torch.rand(SMALLER, 3, size, size, generator=generator)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    shift = torch.arange(3).view(3, 1, 1)
    made = []
    for number in numbers:
        turn, tight = number * 0.7, 4 + number % 13
        along = rows * math.cos(turn) + columns * math.sin(turn)
        made.append(0.47 + 0.4 * torch.sin(tight * along + shift * (1 + number % 5) + number) + grain[number % SMALLER])
    return torch.stack(made).clamp(0, 1)


class PaintingRunner:
    """A runner that draws its pictures instead of optimising them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, model: Model, jobs: Iterable[Job]) -> Generator[Outcome, None, None]:
        for job in jobs:
            yield Outcome(job, *painted(model, job, self.size))


def painted(model: Model, job: Job, size: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a job's files and manifest; see `render_job`."""
    count = len(job.channels)
    images = waves(job.channels, size)
    start = torch.full((count,), 0.1)
    scores = torch.tensor([0.0 if number % 17 == 3 else 2.0 + number % 7 for number in job.channels])
    spec = {
        "recipe": {**job.recipe.as_dict(), "digest": job.recipe.digest},
        "size": [size, size],
        "shortcuts": [],
        "layers": [job.layer],
    }
    dead = scores == 0
    history = torch.linspace(0, 1, job.recipe.steps)[:, None] * scores
    plain = torch.tensor([number % 19 == 7 for number in job.channels]) & ~dead
    rendered = Rendered(images, scores, start, history, dead, plain, channel(job.layer, job.channels).names, spec)
    film = JobFilm(DISPLAYS[job.recipe.display])
    film.steps = job.recipe.steps
    grey = picture(torch.full((3, size, size), 128, dtype=torch.uint8))
    tiles = dict(enumerate(film_tile(image) for image in rendered.displayed()))
    film.moments = {step: dict.fromkeys(range(count), grey) if step == 0 else tiles for step in MOMENTS}
    measurements = measurements_of(model.find(job.layer).channels or 0, job.channels, scores)
    return with_film(film.sheet(rendered), files_of(job, rendered, measurements), manifest_of(job, rendered))


def measurements_of(width: int, channels: Sequence[int], scores: Tensor) -> Measurements:
    """Return what a layer could have made of pictures: each filter answers most to its own, some unsteadily."""
    generator = torch.Generator().manual_seed(channels[0])
    plain = 0.1 * torch.rand(len(channels), width, generator=generator)
    plain[torch.arange(len(channels)), torch.tensor(channels)] = scores
    steady = torch.tensor([0.3 if number % 11 == 5 else 0.9 for number in channels])
    return Measurements(plain, scores * steady, None, torch.zeros(width))


class Snapshots:
    """A few photos, as a dataset."""

    def __init__(self, count: int = 12, side: int = 96) -> None:
        self.photos = waves(range(5000, 5000 + count), side)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError
        return self.photos[index]


def generated(
    store: Path, network: str = "large_store:narrow", *, photos: bool = True, size: int = 96, per_job: int = 64
) -> Summary:
    """Write an atlas of a network of this file into a store.

    Args:
        photos: whether there is evidence.
        size: side of the pictures in pixels.
    """
    plan = atlas(load(network, input_size=64), recipe="fast", size=size, per_job=per_job, precision="fp32")
    with unsynced():
        return run(plan, str(store), PaintingRunner(size), Snapshots() if photos else None)


@contextmanager
def unsynced() -> Iterator[None]:
    """Do not wait for the disk after each file, since these stores need not survive a crash."""
    before = os.fsync
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        os.fsync = before
