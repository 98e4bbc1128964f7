"""Colour: uncorrelated channels and back."""

from __future__ import annotations

import pytest
import torch

from phosphene.rendering.colour import UNCORRELATED_TO_RGB, correlate, decorrelate


def test_one_step_along_each_colour_by_hand() -> None:
    channels = torch.eye(3, dtype=torch.float64)[:, :, None, None]  # picture k has colour k alone
    rgb = correlate(channels)[:, :, 0, 0]
    assert rgb.tolist() == [[row[k] for row in UNCORRELATED_TO_RGB] for k in range(3)]
    light, blue_yellow, green_magenta = rgb.tolist()
    assert max(light) - min(light) < 0.02  # all three rise together
    assert blue_yellow[0] > 0 > blue_yellow[2]
    assert green_magenta[1] < 0 < min(green_magenta[0], green_magenta[2])


def test_each_undoes_the_other() -> None:
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(decorrelate(correlate(image)), image, rtol=1e-12, atol=1e-12)
    assert torch.allclose(correlate(decorrelate(image)), image, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_other_numbers_of_channels_are_left_alone(channels: int) -> None:
    image = torch.randn(2, channels, 4, 5)
    assert torch.equal(correlate(image), image)
    assert torch.equal(decorrelate(image), image)
