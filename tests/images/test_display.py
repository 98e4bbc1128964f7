"""Display rules and colour maps, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from phosphene.images.display import (
    DISPLAYS,
    apply_colormap,
    colormap_image,
    resize_maps,
    standardise,
    standardise_map,
    stretch,
    to_bytes,
)
from phosphene.rendering import recipes


def test_clip_holds_values_inside_zero_to_one() -> None:
    assert DISPLAYS["clip"](torch.tensor([[-0.5, 0.25, 1.5]])).tolist() == [[0.0, 0.25, 1.0]]


def test_stretch_by_hand() -> None:
    images = torch.tensor([[[[2.0, 3.0], [4.0, 6.0]]], [[[-1.0, 0.0], [0.0, 1.0]]], [[[7.0, 7.0], [7.0, 7.0]]]])
    assert stretch(images).flatten(1).tolist() == [[0.0, 0.25, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0] * 4]


def test_standardise_by_hand() -> None:
    # 0, 20, 40 and 260 in bytes: mean 80, deviations -80, -60, -40, 180, standard deviation sqrt(11000)
    images = torch.tensor([[[[0.0, 20 / 255], [40 / 255, 260 / 255]]]], dtype=torch.float64)
    expected = [0.5 + 0.1 * deviation / (11000**0.5 + 1e-5) for deviation in (-80, -60, -40, 180)]
    assert standardise(images).flatten().tolist() == pytest.approx(expected, rel=1e-12)
    outlier = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    outlier[0, 0, 0, 0] = 1.0  # twenty standard deviations up: clipped
    assert standardise(outlier).max().item() == 1.0
    assert standardise(torch.full((1, 1, 2, 2), 0.3)).flatten().tolist() == [0.5] * 4


def test_a_map_is_standardised_by_r4_1() -> None:
    # 0, 0, 0, 4: mean 1, deviation sqrt(3); a flat one becomes 128
    maps = torch.tensor([[[0.0, 0.0], [0.0, 4.0]], [[7.0, 7.0], [7.0, 7.0]]], dtype=torch.float64)
    low, high = 128 - 64 / 3**0.5, 128 + 3 * 64 / 3**0.5
    assert (int(low), int(high)) == (91, 238)
    assert standardise_map(maps).flatten().tolist() == [91, 91, 91, 238, 128, 128, 128, 128]


def test_the_recipes_know_every_display() -> None:
    assert set(DISPLAYS) == {"clip", "stretch", "standardise"}
    for display in DISPLAYS:
        assert dataclasses.replace(recipes.RECIPES["fourier"], display=display).display == display


def test_bytes_are_rounded_to_the_nearest() -> None:
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.1])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_every_byte_survives() -> None:
    values = torch.arange(256)
    assert to_bytes(values / 255).tolist() == values.tolist()


def test_levels_get_the_colours_of_the_map_s_table() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    coloured = apply_colormap(levels, "viridis")
    assert coloured.shape == (16, 16, 3)
    entries = [colormaps["viridis"](entry, bytes=True)[:3] for entry in range(256)]
    assert np.array_equal(coloured.view(256, 3).numpy(), np.array(entries))
    assert coloured[0, 0].tolist() == [68, 1, 84]  # the published ends of viridis
    assert coloured[15, 15].tolist() == [253, 231, 36]
    assert np.array_equal(np.asarray(colormap_image(levels / 255)), coloured.numpy())


def test_resizing_averages_areas_and_repeats() -> None:
    level = torch.tensor([[[0.0, 4.0, 8.0, 8.0]]])
    assert resize_maps(level, (2, 2)).tolist() == [[[2, 8], [2, 8]]]
    assert resize_maps(level[..., :2], (1, 6)).tolist() == [[[0, 0, 0, 4, 4, 4]]]
