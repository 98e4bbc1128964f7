"""Photos made of noise, small networks that see them, and what they do to the channels, worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from phosphene.evidence import photo_pass
from phosphene.evidence.photo_pass import Partial
from phosphene.evidence.quantile_sketch import ABSOLUTE, RELATIVE, QuantileSketch, add_values, empty_sketch
from phosphene.evidence.statistics import SHARES, PhotoStatistics
from phosphene.evidence.top_photos import add_photos, empty_top_photos
from phosphene.network.model import Model


def small_model(module: nn.Module, size: int = 8, **options: Any) -> Model:
    return Model(module=module, name="net", input_size=(size, size), **options)


def random_photos(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """Return photos (n, c, h, w), the third like the first, the eleventh without contrast."""
    photos = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    if count > 10:
        photos[2], photos[10] = photos[0], 0.5
    return photos


class GeneratedPhotos:
    """A dataset of noise of varying strength, generated on request, that notes the requests; some photos are broken."""

    def __init__(self, count: int, size: int = 8, broken: tuple[int, ...] = ()) -> None:
        self.count, self.size, self.broken = count, size, broken
        self.requested: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.requested.append(index)
        if index in self.broken:
            raise OSError("torn")
        noise = torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(index))
        return noise * (0.2 + 0.8 * (index * 7919 % 1000) / 1000)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Make chunks of 8 photos, and batches of 4."""
    with patch.object(photo_pass, "CHUNK", 8), patch.dict(photo_pass.BATCH_LIMITS, cpu=(2**26, 4)):
        yield


def activations_one_by_one(model: Model, photos: Tensor, path: str) -> Tensor:
    """Return the activations (n, c, h, w) of all photos, read one at a time."""
    with model.reading([path]) as read, torch.no_grad():
        return torch.cat([read(photo[None].to(model.prototype_tensor))[path] for photo in photos])


def top_by_hand(maps: Tensor, photos: Tensor, channel: int, top: int) -> list[tuple[float, int, int, int]]:
    """Return peak, photo, row and column of the strongest photos of a channel, of equal photos only the first."""
    entries: list[tuple[float, int, int, int]] = []
    for number, channel_map in enumerate(maps[:, channel].tolist()):
        if any(torch.equal(photos[earlier], photos[number]) for earlier in range(number)):
            continue
        peak, row, column = max(
            (value, -row, -column) for row, values in enumerate(channel_map) for column, value in enumerate(values)
        )
        entries.append((-peak, number, -row, -column))
    return [(-peak, number, row, column) for peak, number, row, column in sorted(entries)[:top]]


def check_by_hand(statistics: PhotoStatistics, maps: Tensor, photos: Tensor, top: int) -> None:
    """Compare the statistics of a layer with those of all its maps (n, c, h, w), in float64."""
    for channel in range(maps.shape[1]):
        means = [sum(values) / len(values) for values in maps[:, channel].double().flatten(1).tolist()]
        mean = sum(means) / len(means)
        std = (sum((value - mean) ** 2 for value in means) / len(means)) ** 0.5
        columns = (statistics.mean, statistics.std, statistics.minimum, statistics.maximum)
        for column, expected in zip(columns, (mean, std, min(means), max(means)), strict=True):
            assert float(column[channel]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert (int(statistics.count[channel]), int(statistics.broken[channel])) == (len(means), 0)
        for share, quantile in zip(SHARES, statistics.quantiles[channel].tolist(), strict=True):
            exact = sorted(means)[round(share * (len(means) - 1))]
            assert abs(quantile - exact) <= max(RELATIVE * abs(exact), ABSOLUTE * max(map(abs, means))) + 1e-15
        ranks = zip(statistics.peaks[channel], statistics.photos[channel], statistics.positions[channel], strict=True)
        for (peak, photo, position), entry in zip(ranks, top_by_hand(maps, photos, channel, top), strict=True):
            assert float(peak) == pytest.approx(entry[0], rel=1e-12, abs=1e-12)
            assert (int(photo), *position.tolist()) == entry[1:]


def single_photo_partials(seed: int, photos: int = 60, channels: int = 7, top: int = 4) -> list[Partial]:
    """Return the results of single photos, with ties, and with images that come twice."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 6, (photos, channels), generator=generator).double()  # many ties
    means = torch.randn(photos, channels, generator=generator, dtype=torch.float64) * torch.logspace(-3, 9, channels)
    means[:, 0] = 0
    hashes = torch.randint(0, photos // 2, (photos,), generator=generator)
    levels = levels[hashes]  # the same image excites the same
    partials = []
    for photo in range(photos):
        strongest, row = empty_top_photos(channels, top), slice(photo, photo + 1)
        positions = torch.full((1, channels, 2), photo)
        valid = torch.ones(1, channels, dtype=torch.bool)
        add_photos(strongest, levels[row], torch.tensor([photo]), positions, hashes[row], valid)
        partials.append(Partial(strongest, add_values(empty_sketch(channels), means[row], valid), 1, 0))
    return partials


def assert_equal_but_for_rounding(first: Partial, second: Partial) -> None:
    for left, right in zip(first.top_photos, second.top_photos, strict=True):
        assert torch.equal(left, right)
    for name in QuantileSketch._fields:
        left, right = getattr(first.sketch, name), getattr(second.sketch, name)
        if name in ("mean", "squares"):
            scale = first.sketch.squares.sqrt() if name == "mean" else first.sketch.squares
            assert bool(((left - right).abs() <= 1e-12 * scale).all())
        else:
            assert torch.equal(left, right), name
    assert (first.seen, first.lost, first.refused) == (second.seen, second.lost, second.refused)
