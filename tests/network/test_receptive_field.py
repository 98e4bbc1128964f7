"""Receptive fields: their arithmetic by hand, and in whole networks the published figures and the gradient."""

from __future__ import annotations

from dataclasses import astuple
from functools import cache

import pytest
import torch
from torch import nn
from torchvision import models

from phosphene.network.capture import capture
from phosphene.network.layers import Layers
from phosphene.network.receptive_field import (
    COLUMNS,
    ROWS,
    Factor,
    ReceptiveFieldState,
    Span,
    merged,
    regrouped,
    simplified,
    slide_along_dim,
)
from phosphene.network.survey import survey
from positive_networks import ends, noise, positive

IMAGE = ReceptiveFieldState.of_image(torch.zeros(1, 3, 8, 6))


def test_spans_grow_by_the_reach_either_way_and_join_over_their_gap() -> None:
    assert Span(2, 3).widened(4) == Span(2, 7)
    assert Span(2, 3).widened(-4) == Span(-2, 7)
    assert Span(2, 3).union(Span(-1, 1)) == Span(-1, 3).union(Span(2, 3)) == Span(-1, 6)


def test_neighbours_that_see_the_same_are_one_factor_and_single_entries_none() -> None:
    row = Factor(4, ROWS, 2)
    assert simplified([Factor(2), Factor(1), Factor(3), row, Factor(5)]) == (Factor(6), row, Factor(5))


def test_an_image_sees_itself_and_a_window_moves_with_its_stride() -> None:
    assert (IMAGE.along(ROWS), IMAGE.along(COLUMNS)) == ((1, 1, 0), (1, 1, 0))
    slid = slide_along_dim(IMAGE, 2, 3, kernel=3, stride=3, padding=1, dilation=2)
    assert slid is not None
    assert slid.has_shape((1, 3, 3, 6))
    assert slid.along(ROWS) == (5, 3, -1)  # 1 + 2·2 pixels from -1
    assert slid.mixed(2).along(ROWS) == (8, 0, 0)  # from -1 to 9, of which 0 to 7 are on the image
    assert slid.mixed(2, 3).is_whole_image


def test_a_reshape_keeps_what_each_entry_sees_or_knows_nothing() -> None:
    halves = regrouped(IMAGE, (3, 4, 2, 6))
    assert halves is not None
    assert halves.layout == ((Factor(3),), (Factor(4, ROWS, 2),), (Factor(2, ROWS, 1),), (Factor(6, COLUMNS, 1),))
    assert regrouped(halves, (1, 3, 8, 6)) is not None
    assert regrouped(IMAGE, (3, 3, 16)) is None  # 8 rows cannot be split into 3


def test_a_sum_sees_what_any_of_its_terms_sees() -> None:
    wide = slide_along_dim(IMAGE, 3, 6, kernel=3, stride=1, padding=1, dilation=1)
    assert wide is not None
    both = merged([IMAGE, wide], (1, 3, 8, 6))
    assert both is not None
    assert both.along(COLUMNS) == (3, 1, -1)
    assert merged([IMAGE, IMAGE.mixed(2, 3)], (1, 3, 8, 6)) == IMAGE.mixed(2, 3)
    corner = slide_along_dim(IMAGE, 2, 1, kernel=1, stride=1, padding=0, dilation=1)
    assert corner is not None
    assert merged([IMAGE, corner.mixed(2)], (1, 3, 8, 6)) is None  # the first row for all, and one more for each


def averaging(net: nn.Module) -> nn.Module:
    """Replace the maximum by the mean in every pooling layer: the same windows, but all of them pass a gradient."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
    return net


NETS = [
    *("alexnet", "resnet18", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small"),
    *("shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny"),
]


def untrained(name: str) -> nn.Module:
    """Return a torchvision network; one with large dense layers has no values yet, for they would take seconds."""
    dense = name in ("alexnet", "vgg16")
    with torch.device("meta" if dense else "cpu"):
        net: nn.Module = models.get_model(
            name, weights=None, **({"init_weights": False} if name == "googlenet" else {})
        )
    return net.to_empty(device="cpu").eval() if dense else net.eval()


@pytest.mark.parametrize("name", NETS)
def test_the_field_in_a_torchvision_network_is_where_the_gradient_is_not_zero(name: str) -> None:
    """At up to eight layers spread over those whose field, at the central position, lies inside the image."""
    net = positive(averaging(untrained(name)))
    image = 0.1 * noise(1, 3, 96, 112)
    table = survey(net, net, dict(net.named_modules()), image)
    centred: dict[str, list[tuple[int, int]]] = {}
    for layer in table:
        if layer.size and layer.receptive_field and min(layer.size) > 1:
            figures = zip(layer.size, *astuple(layer.receptive_field), strict=True)
            boxes = [
                (n // 2 * stride - padding, n // 2 * stride - padding + size - 1)
                for n, size, stride, padding in figures
            ]
            if all(first >= 0 and last < n for (first, last), n in zip(boxes, (96, 112), strict=True)):
                centred[layer.path] = boxes
    assert len(centred) >= 5
    chosen = list(centred)[:: max(1, len(centred) // 5)] + list(centred)[-1:]
    whole = [layer.path for layer in table if layer.sees == "whole" and layer.is_map and layer.channels != 1000][:1]
    addresses = {path: table.find(path).tensor_address for path in chosen + whole}
    modules = {address.path: net.get_submodule(address.path) for address in addresses.values()}
    with capture(net, modules, addresses) as read:
        acts = read(image.requires_grad_())
    for path, act in acts.items():
        (gradient,) = torch.autograd.grad(
            act[:, :, act.shape[2] // 2, act.shape[3] // 2].sum(), image, retain_graph=True
        )
        seen = gradient[0].ne(0).any(0)
        assert [ends(seen.any(1)), ends(seen.any(0))] == centred.get(path, [(0, 95), (0, 111)]), path


@cache
def table_of(name: str) -> Layers:
    """Return the table of a torchvision network for images of 224×224."""
    net = untrained(name)
    return survey(net, net, dict(net.named_modules()), torch.full((1, 3, 224, 224), 0.5))


def size_at(name: str, path: str) -> tuple[int, int, int] | str:
    """Return (size, stride, padding) at a layer of a torchvision network, or "whole" if it sees the whole image."""
    layer = table_of(name).find(path)
    if layer.receptive_field is None:
        return layer.sees
    (size, right), (stride, _), (padding, _) = astuple(layer.receptive_field)
    assert size == right
    return size, stride, padding


def by_formula(*windows: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (size, stride, padding) after windows of (kernel, stride, padding): Araujo et al. 2019, eq. 2 and 4."""
    size, jump, border = 1, 1, 0
    for kernel, stride, padding in windows:
        size, border = size + (kernel - 1) * jump, border + padding * jump
        jump *= stride
    return size, jump, border


BLOCK3, DOWN3 = (3, 1, 1), (3, 2, 1)
POOL = (2, 2, 0)
VGG16 = (*[BLOCK3] * 2, POOL, *[BLOCK3] * 2, POOL, *[BLOCK3] * 3, POOL, *[BLOCK3] * 3, POOL, *[BLOCK3] * 3, POOL)
STEM = ((7, 2, 3), DOWN3)
RESNET50 = (*STEM, *[BLOCK3] * 3, DOWN3, *[BLOCK3] * 3, DOWN3, *[BLOCK3] * 5, DOWN3, *[BLOCK3] * 2)
RESNET18 = (*STEM, *[BLOCK3] * 4, DOWN3, *[BLOCK3] * 3, DOWN3, *[BLOCK3] * 3, DOWN3, *[BLOCK3] * 3)


@pytest.mark.parametrize(
    ("name", "path", "worked_out"),
    [
        ("vgg16", "features.0", (3, 1, 1)),
        ("vgg16", "features.30", by_formula(*VGG16)),
        ("vgg16", "features.30", (212, 32, 90)),
        ("alexnet", "features.12", (195, 32, 66)),
        ("resnet18", "layer4", by_formula(*RESNET18)),
        ("resnet18", "layer4", (435, 32, 217)),
        ("resnet50", "layer1", (35, 4, 17)),
        ("resnet50", "layer2", (91, 8, 45)),
        ("resnet50", "layer3", (267, 16, 133)),
        ("resnet50", "layer4", by_formula(*RESNET50)),
        ("resnet50", "layer4", (427, 32, 213)),
        ("mobilenet_v2", "features.18.0", (491, 32, 245)),
        ("convnext_tiny", "features.0.0", (4, 4, 0)),
        ("convnext_tiny", "features.1.0.block.0", (4 + 6 * 4, 4, 12)),
        ("resnet18", "avgpool", "whole"),
        ("resnet18", "fc", "whole"),
        ("vgg16", "classifier.0", "whole"),
    ],
)
def test_known_networks_have_their_known_fields(name: str, path: str, worked_out: tuple[int, int, int] | str) -> None:
    assert size_at(name, path) == worked_out
