"""Weights in bfloat16, converted once: the same numbers as autocast, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from phosphene.rendering.engine.bf16_weights import Bf16Weights


class SubclassedConv(nn.Conv2d):
    """A class of the user's, which may look at its weights."""


@pytest.fixture
def convolution() -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3).requires_grad_(False)


def test_autocast_finds_the_same_numbers(convolution: nn.Conv2d) -> None:
    image, bf16_weights = torch.rand(2, 3, 9, 9), Bf16Weights([convolution])
    with torch.autocast("cpu", torch.bfloat16):
        expected = convolution(image)
        with bf16_weights.swapped_in():
            assert convolution.weight.dtype == torch.bfloat16
            output = convolution(image)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_weights_are_converted_once_and_again_when_they_change(convolution: nn.Conv2d) -> None:
    bf16_weights, kept = Bf16Weights([convolution]), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), bf16_weights.swapped_in():
            kept.append(convolution.weight)
    assert kept[0] is kept[1]
    convolution.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16), bf16_weights.swapped_in():
        assert torch.equal(convolution.weight, 2 * kept[0])


def test_only_where_autocast_asks_for_it(convolution: nn.Conv2d) -> None:
    double, subclassed = nn.Conv2d(3, 8, 3).double(), SubclassedConv(3, 8, 3)
    bf16_weights = Bf16Weights([convolution, double, subclassed, nn.ReLU()])
    with bf16_weights.swapped_in():
        assert convolution.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), bf16_weights.swapped_in():
        assert (double.weight.dtype, subclassed.weight.dtype) == (torch.float64, torch.float32)


def test_an_error_leaves_the_weights_as_they_were(convolution: nn.Conv2d) -> None:
    weight = convolution.weight
    with (
        pytest.raises(ZeroDivisionError),
        torch.autocast("cpu", torch.bfloat16),
        Bf16Weights([convolution]).swapped_in(),
    ):
        raise ZeroDivisionError
    assert convolution.weight is weight
    assert convolution.weight.dtype == torch.float32
