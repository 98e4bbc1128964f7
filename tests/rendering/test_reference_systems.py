"""R1, R3 and R4.2 of the four reference systems: the recipes against the loops as their authors published them.

Each loop is written out here, in float64, with nothing of the package but the start image, which is read from the first
frame. `g` is the gradient of the mean of one filter's map; `x` is the picture in the unit that the system counts in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import phosphene as ph
from phosphene.images import display
from phosphene.rendering.recipes import choice

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)
CAFFE_MEAN_BGR = torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64).view(1, 3, 1, 1)

Features = Callable[[Tensor], Tensor]  # picture (1, 3, h, w) in 0..1 -> the layer's map (1, c, h, w)


def vgg_shaped() -> nn.Sequential:
    """Return two VGG blocks, 3 → 6 → 6 → pool → 8 → 8, with weights written by seed 7, float64."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential()
    for index, (inputs, outputs) in enumerate(((3, 6), (6, 6), (6, 8), (8, 8))):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1).double()
        with torch.no_grad():
            size = convolution.weight.shape
            convolution.weight.copy_(torch.randn(size, generator=generator, dtype=torch.float64) / (3 * inputs**0.5))
            convolution.bias.copy_(0.1 * torch.randn(outputs, generator=generator, dtype=torch.float64))  # type: ignore[union-attr]
        net.add_module(f"conv{index}", convolution)
        net.add_module(f"relu{index}", nn.ReLU(inplace=True))
        if index == 1:
            net.add_module("pool", nn.MaxPool2d(2))
    return net.eval()


def small_network() -> tuple[ph.Model, str, Features]:
    """Return a handle with ImageNet's normalisation, a layer, and the same features without the package."""
    net = vgg_shaped()
    mean, std = IMAGENET_MEAN.flatten().tolist(), IMAGENET_STD.flatten().tolist()
    model = ph.load(net, mean=mean, std=std, input_size=32)

    def features(picture: Tensor) -> Tensor:
        act = (picture - IMAGENET_MEAN) / IMAGENET_STD
        for name in ("conv0", "relu0", "conv1", "relu1", "pool", "conv2", "relu2"):
            act = net.get_submodule(name)(act)
        # a copy of the last convolution by hand, before the ReLU that works in place
        last = net.get_submodule("conv3")
        return F.conv2d(act, last.weight, last.bias, padding=1)  # type: ignore[arg-type]

    return model, "conv3", features


def built_in_vgg19() -> tuple[ph.Model, str, Features]:
    """Return VGG19 with the trained weights in float64, block2_conv1, and its features from the weights alone."""
    model = ph.load("builtin/vgg19")
    model.module.double()
    weights = {name: tensor.detach().clone() for name, tensor in model.module.state_dict().items()}

    def features(picture: Tensor) -> Tensor:
        act = picture.flip(1) * 255 - CAFFE_MEAN_BGR
        for name in ("block1_conv1", "block1_conv2"):
            act = F.relu(F.conv2d(act, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1))
        act = F.max_pool2d(act, 2)
        return F.conv2d(act, weights["block2_conv1.weight"], weights["block2_conv1.bias"], padding=1)

    return model, "block2_conv1", features


@pytest.fixture(params=[small_network, built_in_vgg19], ids=["small", "vgg19"], scope="module")
def network(request: pytest.FixtureRequest) -> tuple[ph.Model, str, Features]:
    network: tuple[ph.Model, str, Features] = request.param()
    return network


def rendered(
    model: ph.Model, layer: str, channel: int, recipe: str | ph.Recipe, size: int | None, steps: int | None = None
) -> tuple[ph.Rendered, Tensor]:
    """Return what the package makes, and the image it started from."""
    frames: list[ph.Frame] = []
    # two filters in the batch: neither must matter to the other
    objective = ph.channel(layer, [channel, channel + 1])
    result = ph.render(model, objective, recipe, size=size, steps=steps, watch=frames.append)
    return result, frames[0].image[:1]


def gradient(features: Features, picture: Callable[[Tensor], Tensor], x: Tensor, channel: int) -> Tensor:
    """Return d mean(a) / d x."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(features(picture(x))[0, channel].mean(), x)[0]


@pytest.mark.parametrize("recipe", ["max-step", "std-step"])
def test_r1_is_reproduced(network: tuple[ph.Model, str, Features], recipe: str) -> None:
    model, layer, features = network
    result, start = rendered(model, layer, 3, recipe, size=32, steps=5)
    x = start * 255
    assert 128 <= float(x.min()) < float(x.max()) < 129  # uniform(0, 1) + 128
    for _ in range(5):
        g = gradient(features, lambda x: x / 255, x, 3)
        divisor = g.max() if recipe == "max-step" else ((g - g.mean()) ** 2).mean().sqrt()
        x = x + 2.0 / (divisor + 1e-8) * g
    assert float((result.images[:1] * 255 - x).abs().max()) < 1e-9 * 255
    assert float(result.scores[0]) == pytest.approx(features(x / 255)[0, 3].mean().item(), rel=1e-9)

    stretched = ((x - x.min()) / (x.max() - x.min()))[0]
    displayed = display.DISPLAYS["stretch"](result.images)[0]
    assert float((displayed - stretched).abs().max()) < 1e-9
    assert np.array_equal(np.asarray(result.pictures[0]), np.rint(stretched.permute(1, 2, 0).numpy() * 255))


@pytest.mark.parametrize("blur", [0, 3, 4])
def test_r3_is_reproduced(network: tuple[ph.Model, str, Features], blur: int) -> None:
    model, layer, features = network
    recipe = dataclasses.replace(ph.RECIPES["multi-scale"], sizes=(28, 33), blur=blur)  # int(28 × 1.2) = 33
    result, start = rendered(model, layer, 1, recipe, size=None)
    whole = start * 255
    assert float((whole - whole.round()).abs().max()) < 1e-9  # whole numbers, 150 to 179
    assert 150 <= int(whole.round().min()) < int(whole.round().max()) < 180

    picture = start
    for scale in range(2):
        if scale:
            picture = F.interpolate(picture, (33, 33), mode="bicubic", align_corners=False)
            if blur:
                picture = box_blurred(picture, blur)
        x = ((picture - IMAGENET_MEAN) / IMAGENET_STD).detach().requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.1, weight_decay=1e-6)
        for _ in range(20):
            optimiser.zero_grad()
            loss = -features(x * IMAGENET_STD + IMAGENET_MEAN)[0, 1].mean()
            x.grad = torch.autograd.grad(loss, x)[0]
            optimiser.step()
        picture = (x * IMAGENET_STD + IMAGENET_MEAN).detach()
    assert float((result.images[:1] - picture).abs().max()) < 1e-9
    clipped = picture.clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(result.pictures[0]), np.rint(clipped * 255))


def box_blurred(picture: Tensor, side: int) -> Tensor:
    """Return the mean of `side` × `side` pixels, mirrored at the border without repeating it, as OpenCV's `blur`."""
    before = side // 2  # OpenCV's anchor
    padded = np.pad(picture[0].numpy(), ((0, 0), (before, side - 1 - before), (before, side - 1 - before)), "reflect")
    height, width = picture.shape[-2:]
    shifted = [padded[:, y : y + height, x : x + width] for y in range(side) for x in range(side)]
    return torch.from_numpy(np.mean(shifted, 0))[None]


def test_r4_filter_patterns_are_reproduced(network: tuple[ph.Model, str, Features]) -> None:
    model, layer, features = network
    result, start = rendered(model, layer, 5, "rms", size=32)
    x = start * 255
    assert 128 <= float(x.min()) < 129
    assert 147 < float(x.max()) < 148  # uniform(0, 1) · 20 + 128
    for _ in range(40):
        g = gradient(features, lambda x: x / 255, x, 5)
        x = x + g / (torch.sqrt(torch.mean(g**2)) + 1e-5)
    assert float((result.images[:1] * 255 - x).abs().max()) < 1e-9 * 255

    pattern = x[0].permute(1, 2, 0).numpy()
    pattern = (pattern - pattern.mean()) / (pattern.std() + 1e-5) * 0.1 + 0.5
    pattern = np.clip(pattern, 0, 1)
    displayed = display.DISPLAYS["standardise"](result.images)[0].permute(1, 2, 0).numpy()
    assert np.abs(displayed - pattern).max() < 1e-9
    # the original cuts the fraction off (astype("uint8")); phosphene rounds, so a byte is the same or one more
    ours, cut = np.asarray(result.pictures[0]).astype(int), (pattern * 255).astype("uint8").astype(int)
    assert np.array_equal(ours, np.rint(pattern * 255))
    assert set(np.unique(ours - cut)) == {0, 1}


def test_the_recipes_carry_the_published_numbers() -> None:
    r1, r3, r4 = (ph.RECIPES[name] for name in ("max-step", "multi-scale", "rms"))
    assert (r1.sizes, r1.steps, r1.step_rule, r1.display) == ((224,), 150, choice("max", rate=2.0), "stretch")
    assert (r4.sizes, r4.steps, r4.step_rule, r4.display) == ((150,), 40, choice("rms", rate=1.0), "standardise")
    assert r3.sizes == (56, 67, 80, 96, 115, 138, 165, 198, 237, 284, 340, 408)
    assert (r3.steps, r3.step_rule, r3.weight_decay) == (20, choice("adam", rate=0.1), 1e-6)


def test_the_r4_sheet_is_eight_by_eight_pictures_of_64_px_with_margins_of_5() -> None:
    model, layer, _ = small_network()
    result = ph.render(model, ph.channel(layer, [k % 8 for k in range(64)]), "rms", size=64, steps=1)
    sheet = result.grid(captions=False)
    assert sheet.size == (547, 547)  # 8 · 64 + 7 · 5
    pixels = np.asarray(sheet)
    assert not pixels[64:69].any()
    assert not pixels[:, 64:69].any()
    assert np.array_equal(pixels[69:133, 138:202], np.asarray(result.pictures[8 + 2]))


def test_the_r1_demonstration_is_six_pictures_three_wide() -> None:
    model, _, _ = small_network()
    result = ph.render(model, ph.channel(3, range(6)), "max-step", size=16, steps=1)
    assert result.spec["layers"] == ["conv3"]  # the layer is given by its index in the list of convolutions
    assert result.grid(captions=False).size == (3 * 16 + 2 * 5, 2 * 16 + 5)
