"""Less work, same answer: scores and gradients with every shortcut are those of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import phosphene as ph
from phosphene.rendering.engine.forward import SHORTCUTS, fast_forward_pass
from phosphene.rendering.objectives import ScalarRead
from shortcut_comparison import assert_shortcuts_agree, scores_and_gradient, with_random_statistics

BLOCKS = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 2), (6, 5, 1, 80, 112, 1)]
# small members of seven families
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: models.vgg.make_layers([8, "M", 16, "M", 24, 32, "M", 32, 32, "M"]),
    "resnet": lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 4, width_per_group=8),
    "densenet": lambda: models.DenseNet(8, (2, 2), 8, num_classes=4),
    "mobilenet": lambda: models.MobileNetV2(4, 0.35, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 2, 2]]),
    "efficientnet": lambda: models.EfficientNet(
        [models.efficientnet.MBConvConfig(*block, width_mult=0.35) for block in BLOCKS], 0.2, num_classes=4
    ),
    "regnet": lambda: models.RegNet(
        models.regnet.BlockParams.from_init_params(depth=6, w_0=16, w_a=16.0, w_m=2.2, group_width=8, se_ratio=0.25)
    ),
    "convnext": lambda: models.ConvNeXt(
        [models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 1)]
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_networks_scores_the_same(name: str) -> None:
    model = ph.load(with_random_statistics(NETWORKS[name]), input_size=64)
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    convolutions = [layer for layer in model.layers() if layer.convolution]
    for layer in convolutions[:: max(1, len(convolutions) // 8)]:
        last = (layer.channels or 1) - 1
        assert_shortcuts_agree(model, ph.channel(layer.path, [0, last]), image)
        assert_shortcuts_agree(model, ph.neuron(layer.path, [last, 0]), image)


def test_sums_and_multiples_keep_what_they_read(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    both = ph.channel(".4", [1, 2]) - 0.5 * ph.channel(".0", 3) + ph.total_variation() * 2 - 1
    assert both.scalar_reads == {".4": ScalarRead((1, 2), True), ".0": ScalarRead((3, 3), True)}
    assert_shortcuts_agree(model, both, image, {"linear"})
    mixed = ph.channel(".4", [1, 2]) + ph.channel(".4", [2, 1])  # reads two channels of a layer
    assert mixed.scalar_reads == {}
    assert_shortcuts_agree(model, mixed, image)
    same = ph.channel(".4", [1, 2]) + 2 * ph.channel(".4", [1, 2])
    assert_shortcuts_agree(model, same, image, {"linear", "folded", "subpixel"})
    assert_shortcuts_agree(model, ph.channel(".4", 1) + ph.neuron(".4", 1), image[:1])
    assert_shortcuts_agree(model, ph.channel(".5", [1, 2]), image)  # an activation function is not linear
    assert_shortcuts_agree(model, ph.direction(".4", torch.rand(2, 8)), image)


def test_a_layer_below_another_is_read_and_the_network_goes_on(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert_shortcuts_agree(model, ph.channel(".0", [1, 2]) + ph.logit([0, 4]), image, {"linear"})


def test_whoever_watches_or_has_changed_a_layer_is_heard(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=16)
    image = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    doubled = small_net[4].register_forward_hook(lambda _module, _inputs, output: output * 2)
    plain, _, _ = scores_and_gradient(model, ph.channel(".4", [1, 2]), image, ())
    scores, _, shortcuts = scores_and_gradient(model, ph.channel(".4", [1, 2]), image, SHORTCUTS)
    doubled.remove()
    assert torch.allclose(scores, plain)
    assert "linear" not in shortcuts
    before, _, shortcuts = scores_and_gradient(model, ph.channel(".4", [1, 2]), image, SHORTCUTS)
    assert "linear" in shortcuts
    assert torch.allclose(plain, 2 * before)


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
    assert all(parameter is parameters[name] for name, parameter in small_net.named_parameters())
