"""Following receptive fields: through writing in place, and without arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision import models

from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer
from positive_networks import C3, Function, assert_same_value, assert_unknown, compare_with_gradient, noise


def copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(C3(x))
    y.copy_(C3(x))
    return y


def overwritten(x: Tensor) -> Tensor:
    y = C3(x)
    y.mul_(2).add_(C3(C3(x)))
    return y


REGULAR: dict[str, Function] = {
    "a copy into other memory": copied,
    "arithmetic in place": overwritten,
}


@pytest.mark.parametrize("name", REGULAR)
def test_the_field_after_writing_in_place_is_where_the_gradient_is_not_zero(name: str) -> None:
    compare_with_gradient(REGULAR[name], noise(1, 2, 12, 14))
    assert_same_value(REGULAR[name])


def setitem(x: Tensor) -> Tensor:
    """Shift a map down by one row, by writing into a part of fresh memory."""
    y = torch.zeros_like(x)
    y[:, :, 1:] = x[:, :, :-1]
    return y


def stale(x: Tensor) -> Tensor:
    """Return a view of memory that something with a larger field was added to afterwards."""
    y = C3(x)
    view = y.view(1, 2, -1)
    y.add_(C3(C3(x)))
    return view


def into(x: Tensor) -> Tensor:
    y = torch.empty(1, 4, 12, 14, dtype=x.dtype)
    y[:, :2] = x
    y[:, 2:] = C3(x)
    return y


IRREGULAR: dict[str, Function] = {
    "a shift by writing to a part": setitem,
    "a view of memory written to later": stale,
    "parts written into fresh memory": into,
}


@pytest.mark.parametrize("name", IRREGULAR)
def test_the_field_after_writing_to_a_part_is_unknown_and_stays_so(name: str) -> None:
    assert_unknown(IRREGULAR[name])


def test_without_arithmetic_the_fields_and_shapes_are_the_same() -> None:
    net = models.resnet18(weights=None).eval()
    image = torch.rand(1, 3, 64, 80)
    fields = []
    for arithmetic in (True, False):
        tracer = ReceptiveFieldTracer(image, arithmetic)
        with torch.no_grad(), tracer:
            output = net.layer3(net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(image)))))))
        fields.append((tuple(output.shape), tracer.field(output)))
    assert fields[0] == fields[1]
    assert fields[0][1] is not None
