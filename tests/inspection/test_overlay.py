"""Overlays: the colours on the photo, the legend below it, and the sentence on an empty map."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from test_heatmap import SMALL, heatmap, photo, pixels

from phosphene.images.photo import Region
from phosphene.inspection.class_scores import ClassScore
from phosphene.inspection.heatmap import Heatmap


def test_jet_adds_two_fifths_of_the_jet_map_in_bytes() -> None:
    image = photo()
    image[..., 0, 0] = 1.0
    heat = heatmap().upsampled(image).double().numpy()
    jet = matplotlib.colormaps["jet"](heat)[..., :3] * 255
    expected = np.clip(image[0].double().permute(1, 2, 0).numpy() * 255 + 0.4 * jet, 0, 255)
    picture = heatmap().overlay(image, "jet")
    assert picture.size == (12, 8)
    assert np.abs(pixels(picture) - expected).max() <= 0.5 + 1e-9


def test_jet_leaves_alone_what_was_not_seen() -> None:
    image = photo()
    picture = pixels(heatmap(region=Region(0, 0, 8, 6)).overlay(image, "jet"))
    assert np.array_equal(picture[:, 6:], np.rint(image[0].permute(1, 2, 0).numpy() * 255)[:, 6:])


def test_plain_covers_the_photo_more_where_it_is_hotter() -> None:
    image = torch.full((1, 3, 8, 12), 0.4)  # 102 of 255
    picture = pixels(heatmap(torch.tensor([[0.0, 1.0]])).overlay(image, legend=False))
    assert picture.shape == (8, 12, 3)
    assert picture[0, 0].tolist() == [102, 102, 102]
    hottest = np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    assert np.abs(picture[0, -1] - 255 * (0.2 * 0.4 + 0.8 * hottest)).max() <= 0.5
    difference = np.abs(picture[0].astype(int) - 102).sum(1)
    assert (np.diff(difference) >= 0).all()


def test_the_legend_lies_below_the_photo_and_covers_none_of_it() -> None:
    image = photo(200, 300)
    whole = heatmap(size=(200, 300), region=Region(0, 0, 200, 300))
    bare, full = whole.overlay(image, legend=False), whole.overlay(image)
    assert bare.size == (300, 200)
    assert full.width == 300
    assert full.height > 220
    assert np.array_equal(pixels(full)[:200], pixels(bare))
    legend = pixels(full)[200:]
    assert (legend.sum(2) == 0).sum() > 50  # letters
    assert (legend[:, -20].max(1) - legend[:, -20].min(1)).max() > 80  # the hot end of the bar


def test_captions_wrap_rather_than_run_out() -> None:
    image = photo(40, 30)
    name = ClassScore(3, "a very long name " * 5 + "w" * 80, 0.5)
    heat = Heatmap(SMALL, "gradcam", "conv", name, (name,), Region(0, 0, 40, 30), (40, 30), {})
    sheet = pixels(heat.overlay(image))
    assert sheet.shape[1] == 200
    assert (sheet[:, :4] == 255).all()
    assert (sheet[:, -4:] == 255).all()


@pytest.mark.parametrize("channels", [1, 5])
def test_photos_of_other_than_three_channels_are_shown_in_grey(channels: int) -> None:
    image = photo(channels=channels)
    picture = pixels(heatmap(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).overlay(image, legend=False))
    assert picture[0, 0].tolist() == [round(255 * float(image[0, :, 0, 0].mean()))] * 3
