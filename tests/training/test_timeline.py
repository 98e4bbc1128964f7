"""The scale and the sizes of a layer's pictures over a training, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fake_training_record import record_of
from phosphene.training.timeline import KernelTimeline, common_scale, enlarged, weight_range


def test_the_range_of_weights_leaves_out_what_is_not_finite() -> None:
    assert weight_range(torch.tensor([1.0, -3.0, math.nan, math.inf])) == (-3.0, 1.0, 10.0, 2)
    assert weight_range(torch.tensor([math.nan])) == (math.inf, -math.inf, 0.0, 0)


def test_the_common_scale_ends_at_the_largest_weight_or_at_four_times_the_root_mean_square() -> None:
    ranges = [(-3.0, 1.0, 10.0, 2), (0.0, 2.0, 4.0, 2)]
    assert common_scale(ranges, about_zero=False) == (-3.0, 2.0)
    assert common_scale(ranges, about_zero=True) == (-3.0, 3.0)
    outlier = [(0.0, 10.0, 100.0, 100)]  # a root mean square of 1
    assert common_scale(outlier, about_zero=True) == (-4.0, 4.0)
    assert common_scale([(math.inf, -math.inf, 0.0, 0)], about_zero=True) == (-1.0, 1.0)


def test_a_tile_is_enlarged_by_whole_factors() -> None:
    assert enlarged((3, 2), 16) == [(15, 10), (12, 8), (9, 6)]  # 9 pixels are the least


def test_levels_of_a_first_layer_are_colours(tmp_path: Path) -> None:
    weights = torch.zeros(1, 3, 1, 1)
    weights[0, :, 0, 0] = torch.tensor([1.0, 0.0, -1.0])
    timeline = KernelTimeline(record_of(tmp_path, {"conv1": [weights]}), "conv1", "signed")
    tiles, nonfinite = timeline.tiles(0, 1, 3)
    assert tiles.tolist() == [[[[[255, 128, 0]]]]]
    assert nonfinite.tolist() == [[False]]
    assert timeline.caption[0] == "1×1, in colour: grey is 0, full colour ±1"
    assert timeline.scale is None
