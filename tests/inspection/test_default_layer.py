"""The default layer of a heat map, in networks of all kinds."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision import models

from phosphene.errors import LayerRefused
from phosphene.inspection.default_layer import default_layer
from phosphene.network.model import Model

DEFAULTS = {  # name -> side in pixels, layer
    "vgg16": (64, "features.28"),
    "resnet18": (64, "layer4"),
    "densenet121": (64, "features"),
    "inception_v3": (139, "Mixed_7c"),
    "mobilenet_v2": (64, "features"),
    "convnext_tiny": (64, "features"),
    "squeezenet1_1": (64, "classifier.1"),
    "swin_t": (64, "norm"),
    "alexnet": (80, "features.10"),
}


def vgg16() -> nn.Module:
    """Return VGG16 with a single layer as its classifier: a hundred million weights less."""
    features = models.vgg.make_layers(models.vgg.cfgs["D"])
    head = {"avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten(), "classifier": nn.Linear(512 * 49, 10)}
    return nn.Sequential(OrderedDict(features=features, **head))


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_layer(name: str) -> None:
    side, layer = DEFAULTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"init_weights": False} if name == "inception_v3" else {}
        net = (vgg16() if name == "vgg16" else models.get_model(name, weights=None, **options)).eval()
    assert default_layer(Model(net, name, (side, side))).path == layer


def test_a_bare_activation_and_what_is_pooled_do_not_count() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4 * 16, 2)).eval()
    assert default_layer(Model(net, "net", (8, 8))).path == ".1"
    assert default_layer(Model(net[:2], "net", (8, 8))).path == ".1"


def test_a_network_without_convolutions_has_none() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(LayerRefused, match="net has no convolution or normalisation with a map that counts; name a"):
        default_layer(Model(net, "net", (8, 8)))
