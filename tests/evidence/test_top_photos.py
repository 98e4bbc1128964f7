"""The strongest photos: an order without ties, and each image once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene.evidence.collect import evidence
from phosphene.evidence.top_photos import NO_PHOTO, TopPhotos, empty_top_photos, merge_top_photos
from random_photos import random_photos, small_chunks, small_model


def top_photos(entries: list[tuple[float, int, int]]) -> TopPhotos:
    """Return the three strongest photos of one channel, from entries of (peak, photo, image hash)."""
    peaks, photos, hashes = (torch.tensor([column]) for column in zip(*entries, strict=True))
    positions = photos[..., None].expand(-1, -1, 2)
    return merge_top_photos(empty_top_photos(1, 3), TopPhotos(peaks.double(), photos, positions, hashes))


def test_the_strongest_by_hand() -> None:
    # photo 4 is image 9 again, which 1 showed as strongly; 2 and 7 tie; 3 is image 8 again, weaker than 7 showed it
    first = top_photos([(5.0, 1, 9), (3.0, 2, 6), (2.5, 3, 8)])
    second = top_photos([(5.0, 4, 9), (3.0, 7, 8), (1.0, 5, 5)])
    for both in (merge_top_photos(first, second), merge_top_photos(second, first)):
        assert both.photos.tolist() == [[1, 2, 7]]
        assert both.peaks.tolist() == [[5, 3, 3]]
        assert both.positions[0, :, 0].tolist() == [1, 2, 7]
    few = merge_top_photos(top_photos([(5.0, 1, 9)]), top_photos([(5.0, 4, 9)]))
    assert few.photos.tolist() == [[1, NO_PHOTO, NO_PHOTO]]
    assert few.peaks.tolist() == [[5, -torch.inf, -torch.inf]]


@small_chunks()
def test_the_same_image_under_two_names_is_listed_once(small_net: nn.Sequential) -> None:
    photos = random_photos(20)
    photos[17] = photos[5]
    statistics = evidence(small_model(small_net), photos, [0], top=20)[".0"]
    for channel in range(6):
        numbers = statistics.photos[channel].tolist()
        assert sorted(numbers) == [NO_PHOTO, NO_PHOTO, 0, 1, *range(3, 17), 18, 19]  # 2 is 0 again
    assert statistics.count.tolist() == [20] * 6


@small_chunks()
def test_of_equal_peaks_the_lower_number_comes_first(small_net: nn.Sequential) -> None:
    with torch.no_grad():
        small_net.get_parameter("0.weight")[2] = 0  # a channel that is the same for every photo, everywhere
    statistics = evidence(small_model(small_net), random_photos(30, seed=3), [0], top=4)[".0"]
    assert statistics.photos[2].tolist() == [0, 1, 3, 4]
    assert statistics.positions[2].tolist() == [[0, 0]] * 4
    assert float(statistics.std[2]) == pytest.approx(0, abs=1e-15)
