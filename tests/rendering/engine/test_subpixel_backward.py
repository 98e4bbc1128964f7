"""The gradient with respect to an image of few channels, several pixels at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from phosphene.rendering.engine.subpixel_backward import block_taps, few_channel_convolutions, image_gradient, subpixel


def test_the_taps_of_a_block_by_hand() -> None:
    # three weights, padding 1: pixel 0 takes weight 2 from slope -1, 1 from 0, 0 from 1; pixel 1 each one further
    plain = block_taps(3, 1, 1, 2)
    assert (plain.first, plain.step) == (-1, 2)
    assert plain.matrix.nonzero().tolist() == [[0, 0, 2], [0, 1, 1], [0, 2, 0], [1, 0, 3], [1, 1, 2], [1, 2, 1]]
    # every second slope, no padding: pixel 0 takes weight 2 from slope -1 and 0 from slope 0, pixel 1 weight 1 from 0
    strided = block_taps(3, 2, 0, 2)
    assert (strided.first, strided.step) == (-1, 1)
    assert strided.matrix.nonzero().tolist() == [[0, 0, 1], [0, 2, 0], [1, 1, 1]]


def test_a_gradient_by_hand() -> None:
    weight = torch.tensor([[[[2.0, -1.0, 3.0]]]], dtype=torch.float64)
    grad_output = torch.tensor([[[[1.0, 10.0, 100.0]]]], dtype=torch.float64)
    # pixel i gets weight k of slope i - k: 2, 20 - 1, 200 - 10 + 3, -100 + 30, 300
    gradient = image_gradient(grad_output, weight, 1, (0, 0), (1, 5))
    assert gradient.flatten().tolist() == [2.0, 19.0, 193.0, -70.0, 300.0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_it_is_the_gradient_whatever_the_shapes(channels: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for side, padding, height, width in product((1, 2, 3, 7, 11), (0, 1, 3), (13, 24), (17, 32)):
        if padding > side:
            continue
        weight = torch.randn(5, channels, side, max(1, side - 1), generator=generator, dtype=torch.float64)
        image = torch.zeros(2, channels, height, width, dtype=torch.float64, requires_grad=True)
        output = F.conv2d(image, weight, stride=stride, padding=(padding, 0))
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        expected = torch.autograd.grad(output, image, grad_output)[0]
        gradient = image_gradient(grad_output, weight, stride, (padding, 0), (height, width))
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_values_are_the_convolutions_own_and_low_precision_is_only_rounding() -> None:
    convolution = nn.Conv2d(3, 32, 3, padding=1).requires_grad_(False)
    image = torch.rand(2, 3, 20, 20, requires_grad=True)
    plain = convolution(image)
    expected = torch.autograd.grad(plain.square().sum(), image)[0]
    with subpixel(few_channel_convolutions([convolution])):
        output = convolution(image)
        assert torch.equal(output, plain)
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), image)[0], expected, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            low = convolution(image)
        assert low.dtype == torch.bfloat16
        gradient = torch.autograd.grad(low.float().square().sum(), image)[0]
        assert gradient.dtype == torch.float32
        assert float((gradient - expected).abs().max() / expected.abs().max()) < 0.02
    assert "forward" not in vars(convolution)


class CustomConv(nn.Conv2d):
    """A class of the user's, which may do otherwise."""


def test_only_convolutions_that_it_knows_are_changed() -> None:
    fits = [nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 7, stride=2, padding=3), nn.Conv2d(1, 8, 5)]
    others = [
        nn.Conv2d(5, 8, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(3, 8, 3, dilation=2),
        nn.Conv2d(3, 8, 3, stride=(1, 2)),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        CustomConv(3, 8, 3),
        nn.ReLU(),
    ]
    patched = nn.Conv2d(3, 8, 3)
    patched.forward = lambda image: image  # type: ignore[method-assign,assignment]
    assert few_channel_convolutions([*others, *fits, patched]) == fits


def test_an_error_leaves_nothing_behind() -> None:
    convolution = nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="channels"), subpixel([convolution]):
        convolution(torch.zeros(1, 2, 8, 8))
    assert "forward" not in vars(convolution)
