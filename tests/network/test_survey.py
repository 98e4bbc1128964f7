"""The survey: the tables of networks whose layers are known."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import phosphene
from phosphene.errors import LayerRefused, SizeRefused
from phosphene.network.capture import TensorAddress
from phosphene.network.layers import Layers, ReceptiveField
from phosphene.network.model import Model
from phosphene.network.receptive_field_tracer import ReceptiveFieldTracer
from phosphene.network.survey import survey, trace


def table(net: nn.Module, *shape: int) -> Layers:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return survey(net, net, dict(net.named_modules()), image)


def field(size: int, stride: int, padding: int) -> ReceptiveField:
    return ReceptiveField((size, size), (stride, stride), (padding, padding))


@pytest.fixture(scope="module")
def vgg19() -> Layers:
    return phosphene.load("builtin/vgg19").layers()


@pytest.fixture(scope="module")
def lite0() -> Layers:
    return phosphene.load("builtin/efficientnet-lite0").layers()


@pytest.fixture(scope="module")
def resnet18() -> Layers:
    return table(models.resnet18(weights=None), 3, 224, 224)


def test_vgg19_has_the_layers_of_configuration_e(vgg19: Layers) -> None:
    expected, side = [], 224
    for block, (count, width) in enumerate(((2, 64), (2, 128), (4, 256), (4, 512), (4, 512)), 1):
        for index in range(1, count + 1):
            expected.append((f"block{block}_conv{index}", "Conv2d", width, (side, side)))
            expected.append((f"block{block}_relu{index}", "ReLU", width, (side, side)))
        side //= 2
        expected.append((f"block{block}_pool", "MaxPool2d", width, (side, side)))
    assert [(layer.path, layer.kind, layer.channels, layer.size) for layer in vgg19] == expected
    assert [layer.path for layer in vgg19.convolutions] == [path for path, kind, *_ in expected if kind == "Conv2d"]
    assert {layer.in_place for layer in vgg19} == {None}


def test_vgg19_has_the_receptive_fields_worked_out_by_hand(vgg19: Layers) -> None:
    by_hand = {
        "block1_conv2": field(5, 1, 2),
        "block1_pool": field(6, 2, 2),
        "block3_conv1": field(24, 4, 10),  # 16 + 2·4
        "block4_conv1": field(68, 8, 30),  # 52 + 2·8
        "block5_conv1": field(156, 16, 70),  # 124 + 2·16
        "block5_conv4": field(252, 16, 118),
        "block5_pool": field(268, 32, 118),
    }
    assert {path: vgg19.find(path).receptive_field for path in by_hand} == by_hand


def test_efficientnet_lite0_is_as_published(lite0: Layers) -> None:
    """Tan & Le 2019, table 1, lite: stem 32, blocks 16 24 40 80 112 192 320 by 1 2 2 3 3 4 1, head 1280."""
    widths = [16] + [24] * 2 + [40] * 2 + [80] * 3 + [112] * 3 + [192] * 4 + [320]
    sides = [112] + [56] * 2 + [28] * 2 + [14] * 6 + [7] * 5
    blocks = [lite0.find(f"_blocks.{number}") for number in range(16)]
    assert [layer.channels for layer in blocks] == widths
    assert [layer.size for layer in blocks] == [(side, side) for side in sides]
    assert len(lite0.convolutions) == 1 + 2 + 15 * 3 + 1
    assert {layer.kind for layer in lite0.convolutions} == {"Conv2dStaticSamePadding"}
    assert [lite0.find(number).path for number in (0, 1, 48)] == [
        "_conv_stem",
        "_blocks.0._depthwise_conv",
        "_conv_head",
    ]
    # the stem pads right and below only: 3, then 5·... depthwise convolutions of 3, 3, 3, 5 up to block 3
    assert lite0.find("_conv_stem").receptive_field == field(3, 2, 0)
    assert lite0.find("_blocks.1._depthwise_conv").receptive_field == field(3 + 4 + 4, 4, 2)
    assert lite0.find("_blocks.3._depthwise_conv").receptive_field == field(3 + 4 + 4 + 8 + 16, 8, 2 + 4 + 4)
    head = lite0.find("_fc")
    assert (head.channels, head.size, head.sees, head.receptive_field) == (1000, None, "whole", None)


def test_a_module_that_runs_twice_has_a_row_a_call(lite0: Layers) -> None:
    assert [lite0.find(f"_swish@{call}").channels for call in (0, 1)] == [32, 1280]
    assert lite0.find("_swish@1").tensor_address == TensorAddress("_swish", 1)
    with pytest.raises(LayerRefused, match="'_swish' stands for 2 results; choose one of: _swish@0, _swish@1"):
        lite0.find("_swish")


def test_resnet18_tells_what_overwrites_a_layer(resnet18: Layers) -> None:
    overwritten = {layer.path: layer.in_place for layer in resnet18}
    assert {path: overwritten[path] for path in ("bn1", "layer1.0.bn1", "layer4.1.bn1")} == dict.fromkeys(
        ("bn1", "layer1.0.bn1", "layer4.1.bn1"), "relu_"
    )
    assert {overwritten[f"layer{stage}.{block}.bn2"] for stage in (1, 2, 3, 4) for block in (0, 1)} == {"add_"}
    kept = ["conv1", "relu", "maxpool", "layer1.0.conv1", "layer1.0", "layer1", "layer2.0.downsample.1", "fc"]
    assert {path: overwritten[path] for path in kept} == dict.fromkeys(kept)
    assert len([path for path, by in overwritten.items() if by]) == 1 + 8 + 8
    assert overwritten["layer1.0.relu@0"] is overwritten["layer1.0.relu@1"] is None


def test_what_overwrites_is_what_a_plain_hook_loses(resnet18: Layers) -> None:
    net = models.resnet18(weights=None).eval()
    clones: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    paths = [layer.path for layer in resnet18 if "@" not in layer.path]
    for path in paths:

        def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
            clones[path], kept[path] = output.clone(), output

        net.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        net(torch.rand(1, 3, 64, 64))
    lost = [path for path in paths if not torch.equal(clones[path], kept[path])]
    assert lost == [path for path in paths if resnet18.find(path).in_place]


def test_resnet18_has_its_known_rows(resnet18: Layers) -> None:
    assert len(resnet18.convolutions) == 20
    assert [resnet18.find(number).path for number in (0, 1, 7, 19)] == [
        "conv1",
        "layer1.0.conv1",
        "layer2.0.downsample.0",
        "layer4.1.conv2",
    ]
    rows = {
        "conv1": (64, (112, 112), field(7, 2, 3)),
        "maxpool": (64, (56, 56), field(11, 4, 5)),
        "layer2.0.downsample.0": (128, (28, 28), field(43, 8, 21)),
        "layer4": (512, (7, 7), field(435, 32, 217)),
        "avgpool": (512, (1, 1), None),
        "fc": (1000, None, None),
    }
    for path, row in rows.items():
        layer = resnet18.find(path)
        assert (layer.channels, layer.size, layer.receptive_field) == row, path


@pytest.mark.parametrize(
    ("name", "side", "count"), [("mobilenet_v2", 64, 52), ("inception_v3", 80, 94), ("convnext_tiny", 64, 22)]
)
def test_only_convolutions_count_and_no_containers_of_them(name: str, side: int, count: int) -> None:
    """As many as papers and `named_modules` say; auxiliary classifiers do not run in evaluation mode."""
    net = models.get_model(name, weights=None, **({"init_weights": False} if name == "inception_v3" else {}))
    layers = table(net, 3, side, side)
    assert [layer.path for layer in layers.convolutions] == [
        layer.path for layer in layers if isinstance(net.get_submodule(layer.tensor_address.path), nn.Conv2d)
    ]
    assert len(layers.convolutions) == count
    counted = {layer.kind for layer in layers.convolutions}
    containers = {layer.kind for layer in layers if "Conv" in layer.kind} - counted
    assert containers == {"mobilenet_v2": {"Conv2dNormActivation"}, "inception_v3": {"BasicConv2d"}}.get(
        name, {"Conv2dNormActivation"}
    )


class StdConv2d(nn.Conv2d):
    """Standardises its weights before it uses them, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Conv2D(nn.Module):
    """A convolution of another framework, which is no nn.Conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(3, 3, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.permute(3, 2, 0, 1), padding=1)


class ConvBlock(nn.Sequential):
    """A container by the name of its contents."""


def test_convolutions_of_every_make_count_and_those_of_other_dimensions_do_not() -> None:
    net = ConvBlock(
        OrderedDict(
            standardised=StdConv2d(2, 2, 3, padding=1),
            foreign=Conv2D(),
            block=ConvBlock(OrderedDict(inner=nn.ConvTranspose2d(4, 2, 3))),
            flat=nn.Flatten(2),
            line=nn.Conv1d(2, 2, 3),
        )
    )
    assert [layer.path for layer in table(net, 2, 8, 8).convolutions] == ["standardised", "foreign", "block.inner"]


def test_channels_last_is_no_map() -> None:
    layers = table(models.convnext_tiny(weights=None), 3, 64, 64)
    first, norm = layers.find("features.1.0.block.0"), layers.find("features.1.0.block.2")
    assert (first.channels, first.size, first.is_map) == (96, (16, 16), True)
    assert (norm.channels, norm.size, norm.is_map) == (None, None, False)
    assert norm.receptive_field == first.receptive_field == field(28, 4, 12)
    assert layers.find("features.1.0").size == (16, 16)


class Heads(nn.Module):
    """Returns several tensors, one of them nested, and is called twice with the same tail."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Split()
        self.tail = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Any]:
        low, high = self.split(x)
        return {"logits": self.tail(low).mean((2, 3)), "maps": [self.tail(high), None]}


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :1], F.avg_pool2d(x[:, 1:], 2)


def test_every_call_and_every_part_has_its_row() -> None:
    net = nn.Sequential(Heads())
    layers = table(net, 3, 4, 6)
    assert [(layer.path, layer.channels, layer.size) for layer in layers] == [
        ("0.split#0", 1, (4, 6)),
        ("0.split#1", 2, (2, 3)),
        ("0.tail@0", 1, (4, 6)),
        ("0.tail@1", 2, (2, 3)),
        (".0#logits", 1, None),
        (".0#maps.0", 2, (2, 3)),
    ]
    assert (
        layers.find(".0#maps.0").tensor_address
        == layers.find("0#maps.0").tensor_address
        == TensorAddress("0", 0, "maps.0")
    )
    assert layers.find("0.split#1").tensor_address == TensorAddress("0.split", 0, "1")
    for address in ("0", ".0"):
        with pytest.raises(LayerRefused, match=r"choose one of: \.0#logits, \.0#maps\.0"):
            layers.find(address)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t"])
def test_the_table_without_arithmetic_is_the_table_with_it(name: str) -> None:
    net = models.get_model(name, weights=None).eval()
    modules, image = dict(net.named_modules()), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tables = [
            list(trace(net, modules, image, ReceptiveFieldTracer(image, arithmetic))) for arithmetic in (True, False)
        ]
    assert tables[0] == tables[1]
    assert len(tables[0]) > 40


class Particular(nn.Module):
    """Minds its values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if not x.any():
            raise ValueError("nothing to see")
        return x


def test_a_network_that_minds_its_values_is_surveyed_with_real_ones() -> None:
    assert [layer.path for layer in table(Particular(), 1, 4, 4)] == ["conv"]


def test_the_network_words_its_own_error() -> None:
    """Also where the arithmetic was left out."""
    net = nn.Sequential(nn.Conv2d(3, 2, 5))
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 1 channels"):
        table(net, 1, 8, 8)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        table(net, 3, 8, 4)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        table(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), 1, 4, 4)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        table(net.double(), 3, 8, 8)
    with pytest.raises(SizeRefused, match=r"tiny does not take a picture of 3×8×4.*Calculated padded input size"):
        Model(net, "tiny", (8, 4)).layers()


def test_a_survey_leaves_no_trace(
    small_net: nn.Sequential, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    small_net.train()
    small_net[1].eval()
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    with untouched(small_net):
        assert len(survey(small_net, small_net, dict(small_net.named_modules()), image)) == 9
    with untouched(small_net), pytest.raises(RuntimeError):
        survey(small_net, small_net, dict(small_net.named_modules()), image[:, :2])


def test_a_survey_imports_no_compiler() -> None:
    """PyTorch's compiler and its algebra take two seconds to import."""
    code = """
import sys, torch, phosphene.network.survey
before = set(sys.modules)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
phosphene.network.survey.survey(net, net, dict(net.named_modules()), torch.rand(1, 3, 8, 8))
compiler = ("sympy", "torch._dynamo", "torch._inductor")
print(sorted(name for name in set(sys.modules) - before if name.startswith(compiler)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
