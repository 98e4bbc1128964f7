"""Receptive fields of whole networks: the published figures, and where the gradient is not zero."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from phosphene.network.capture import capture
from phosphene.network.survey import survey
from positive_networks import noise, positive


def ends(mask: Tensor) -> tuple[int, int]:
    """Return the first and the last index where a mask (n,) is true."""
    found = mask.nonzero().flatten()
    return int(found[0]), int(found[-1])


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
NO_START = {one: {"init_weights": False} for one in ("vgg11_bn", "googlenet", "inception_v3")}


@pytest.mark.parametrize("name", NETS)
def test_the_field_in_a_torchvision_network_is_where_the_gradient_is_not_zero(name: str) -> None:
    """At up to eight layers spread over those whose field, at the central position, lies inside the image."""
    net = positive(averaging(models.get_model(name, weights=None, **NO_START.get(name, {}))))
    image = 0.1 * noise(1, 3, 96, 112)
    table = survey(net, net, dict(net.named_modules()), image)
    centred: dict[str, list[tuple[int, int]]] = {}
    for one in table:
        if one.size and one.receptive_field and min(one.size) > 1:
            figures = zip(one.size, *astuple(one.receptive_field), strict=True)
            boxes = [
                (n // 2 * stride - padding, n // 2 * stride - padding + size - 1)
                for n, size, stride, padding in figures
            ]
            if all(first >= 0 and last < n for (first, last), n in zip(boxes, (96, 112), strict=True)):
                centred[one.path] = boxes
    assert len(centred) >= 5
    chosen = list(centred)[:: max(1, len(centred) // 5)] + list(centred)[-1:]
    whole = [one.path for one in table if one.sees == "whole" and one.is_map and one.channels != 1000][:1]
    places = {path: table.find(path).place for path in chosen + whole}
    with capture(net, {one.path: net.get_submodule(one.path) for one in places.values()}, places) as read:
        kept = read(image.requires_grad_())
    for path, act in kept.items():
        (gradient,) = torch.autograd.grad(
            act[:, :, act.shape[2] // 2, act.shape[3] // 2].sum(), image, retain_graph=True
        )
        seen = gradient[0].ne(0).any(0)
        assert [ends(seen.any(1)), ends(seen.any(0))] == centred.get(path, [(0, 95), (0, 111)]), path


def size_at(name: str, path: str, pixels: int = 224) -> tuple[int, int, int] | str:
    """Return (size, stride, padding) at a layer of a torchvision network, or how much it sees where that is no part."""
    net = models.get_model(name, weights=None, **NO_START.get(name, {})).eval()
    one = survey(net, net, dict(net.named_modules()), torch.full((1, 3, pixels, pixels), 0.5)).find(path)
    if one.receptive_field is None:
        return one.sees
    (size, right), (stride, _), (padding, _) = (
        one.receptive_field.size,
        *((one.receptive_field.stride, one.receptive_field.padding)),
    )
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
