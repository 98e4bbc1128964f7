"""Less work, same answer: scores and gradients with every shortcut are those of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import phosphene as ph
from phosphene.rendering.engine.forward import SHORTCUTS, fast_forward_pass
from phosphene.rendering.objectives import Objective, ScalarRead


def lively(module: nn.Module) -> nn.Module:
    """Return a network in float64 whose normalisations do something, seed 0."""
    generator = torch.Generator().manual_seed(0)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d) and one.running_mean is not None and one.running_var is not None:
            one.running_mean.copy_(torch.randn(one.num_features, generator=generator) * 0.3)
            one.running_var.copy_(torch.rand(one.num_features, generator=generator) + 0.5)
    return module.double().eval()


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return lively(build())


def scored(model: ph.Model, objective: Objective, image: Tensor, shortcuts: tuple[str, ...]) -> tuple[Any, ...]:
    """Return scores (n,), their gradient, and the shortcuts taken."""
    items = torch.arange(len(image))
    with fast_forward_pass(model, objective, shortcuts) as (read, taken):
        leaf = image.clone().requires_grad_()
        scores = objective.score(read(leaf, items), leaf, items)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0], taken()


def assert_same(model: ph.Model, objective: Objective, image: Tensor, wanted: set[str] | None = None) -> None:
    plain, plain_slope, none = scored(model, objective, image, ())
    assert none == ()
    scores, slope, taken = scored(model, objective, image, SHORTCUTS)
    torch.testing.assert_close(scores, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, plain_slope, rtol=1e-9, atol=1e-9 * float(plain_slope.abs().max()))
    if wanted is not None:
        assert set(taken) == wanted


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg11": (lambda: models.vgg11(weights=None, num_classes=4).features, 64),
    "resnet18": (lambda: models.resnet18(weights=None), 64),
    "densenet": (lambda: models.DenseNet(8, (2, 2), 8, num_classes=4), 64),
    "mobilenet": (lambda: models.mobilenet_v2(weights=None, width_mult=0.35), 64),
    "efficientnet": (lambda: models.efficientnet_b0(weights=None), 64),
    "regnet": (lambda: models.regnet_y_400mf(weights=None), 64),
    "convnext": (
        lambda: models.convnext.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 1)]
        ),
        64,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_networks_scores_the_same(name: str) -> None:
    build, size = NETWORKS[name]
    model = ph.load(made(build), input_size=size)
    image = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    convolutions = [one for one in model.layers() if one.convolution]
    for layer in convolutions[:: max(1, len(convolutions) // 8)]:
        last = (layer.channels or 1) - 1
        assert_same(model, ph.channel(layer.path, [0, last]), image)
        assert_same(model, ph.neuron(layer.path, [last, 0]), image)


KINDS: dict[str, nn.Conv2d] = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 6, 3, padding=1, bias=False),
    "strided": nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2)),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2, padding="same"),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "mirrored": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "round": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", groups=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_convolution_is_read_without_running_it(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), KINDS[name]).double().eval()
    model = ph.load(net, input_size=19)
    image = torch.rand(3, 3, 19, 19, dtype=torch.float64)
    assert_same(model, ph.channel(".2", [5, 0, 5]), image, {"linear", "subpixel"})
    assert_same(model, ph.neuron(".2", [1, 4, 0], (1, 2)), image)
    runs: list[int] = []

    def counted(*given: Any) -> Tensor:
        runs.append(1)
        return ORIGINAL(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", counted)
        scored(model, ph.channel(".2", [5, 0, 5]), image, SHORTCUTS)
    assert len(runs) == 1  # the first convolution alone


ORIGINAL: Callable[..., Tensor] = nn.Conv2d._conv_forward


def test_the_mean_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=True)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[2.0, -1.0]]]]))  # type: ignore[operator]
        net[0].bias.fill_(5.0)  # type: ignore[operator]
    image = torch.tensor([[[[1.0, 3.0, 2.0]]]], dtype=torch.float64)
    # 2·1 - 3 + 5 and 2·3 - 2 + 5, their mean; each pixel's share of it: 2/2, (-1 + 2)/2, -1/2
    score, slope, taken = scored(ph.load(net, input_size=(1, 3)), ph.channel(".0", 0), image, SHORTCUTS)
    assert score.tolist() == [6.5]
    assert slope.flatten().tolist() == [1.0, 0.5, -0.5]
    assert taken == ("linear",)


def test_sums_and_multiples_keep_what_they_read(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    both = ph.channel(".4", [1, 2]) - 0.5 * ph.channel(".0", 3) + ph.total_variation() * 2 - 1
    assert both.scalar_reads == {".4": ScalarRead((1, 2), True), ".0": ScalarRead((3, 3), True)}
    assert_same(model, both, image, {"linear"})
    mixed = ph.channel(".4", [1, 2]) + ph.channel(".4", [2, 1])  # reads two channels of a layer
    assert mixed.scalar_reads == {}
    assert_same(model, mixed, image)
    same = ph.channel(".4", [1, 2]) + 2 * ph.channel(".4", [1, 2])
    assert_same(model, same, image, {"linear", "folded", "subpixel"})
    assert_same(model, ph.channel(".4", 1) + ph.neuron(".4", 1), image[:1])
    assert_same(model, ph.channel(".5", [1, 2]), image)  # an activation function is not linear
    assert_same(model, ph.direction(".4", torch.rand(2, 8)), image)


def test_a_layer_below_another_is_read_and_the_network_goes_on(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert_same(model, ph.channel(".0", [1, 2]) + ph.logit([0, 4]), image, {"linear"})


def test_whoever_watches_or_has_changed_a_layer_is_heard(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    doubled = small_net[4].register_forward_hook(lambda _module, _inputs, output: output * 2)
    plain, _, _ = scored(model, ph.channel(".4", [1, 2]), image, ())
    scores, _, taken = scored(model, ph.channel(".4", [1, 2]), image, SHORTCUTS)
    doubled.remove()
    assert torch.allclose(scores, plain)
    assert "linear" not in taken
    before, _, taken = scored(model, ph.channel(".4", [1, 2]), image, SHORTCUTS)
    assert "linear" in taken
    assert torch.allclose(plain, 2 * before)


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [None, (0, 0), (3, 7), (7, 7), (7, 0)])
@pytest.mark.parametrize("path", [".6", ".7", ".5"])
def test_a_neuron_needs_no_more_than_it_sees(path: str, position: tuple[int, int] | None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(),
            nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3, padding=1), nn.Softplus(),
        ).double().eval()  # fmt: skip
    model = ph.load(net, input_size=32)
    image = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    chosen = ph.neuron(path, [1, 4, 0], position)
    assert_same(model, chosen, image)
    assert "cropped" in scored(model, chosen, image, SHORTCUTS)[2]
    sizes: list[tuple[int, ...]] = []
    seen: Any = net[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(tuple(inputs[0].shape)))
    scored(model, chosen, image, SHORTCUTS)
    seen.remove()
    assert sizes[-1][0] == 3
    assert sizes[-1][-1] <= (17 if path == ".5" else 25)


def test_what_sees_the_whole_picture_is_not_cropped() -> None:
    model = ph.load(made(lambda: models.efficientnet_b0(weights=None)), input_size=64)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert_same(model, ph.neuron("features.3.1.block.3.0", 2), image)  # squeeze-and-excitation comes before


def test_a_position_that_the_map_has_not_is_refused_all_the_same(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    for path in (".4", ".5"):
        with pytest.raises(ph.errors.InvalidRequest, match="has a map of 8×8; there is no position 8, 0"):
            ph.render(model, ph.neuron(path, 1, (8, 0)), "fast", size=16, steps=1)
    with pytest.raises(ph.errors.ChannelNotFound, match="has 8 channels, 0 to 7; there is no 8"):
        ph.render(model, ph.channel(".4", 8), "fast", size=16, steps=1)


def test_a_result_says_which_shortcuts_were_taken(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    pictures = ph.render(model, ph.channel(".4", [0, 1]), "fast", size=16, steps=2)
    assert pictures.spec["shortcuts"] == ["linear", "folded", "subpixel"]
    assert ph.render(model, ph.channel(".1", 0), "fast", size=16, steps=2).spec["shortcuts"] == ["subpixel"]


def test_the_module_is_left_as_it_was(small_net: nn.Sequential, untouched: Any) -> None:
    model = ph.load(small_net, input_size=32)
    with untouched(small_net):
        ph.render(model, ph.neuron(".4", [0, 1]), "fast", size=32, steps=2)
    parameters = dict(small_net.named_parameters())

    def interrupted() -> None:
        with fast_forward_pass(model, ph.channel(".4", 1)) as (read, _):
            read(torch.rand(1, 3, 16, 16, dtype=torch.float64), torch.tensor([0]))
            raise KeyboardInterrupt

    with untouched(small_net), pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(one is parameters[name] for name, one in small_net.named_parameters())
