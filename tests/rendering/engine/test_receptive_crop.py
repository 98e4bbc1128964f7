"""Running only the part of a picture that a neuron sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

import phosphene as ph
from phosphene.rendering.engine.forward import SHORTCUTS
from shortcut_comparison import assert_shortcuts_agree, scores_and_gradient, with_random_statistics


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
    assert_shortcuts_agree(model, chosen, image)
    assert "cropped" in scores_and_gradient(model, chosen, image, SHORTCUTS)[2]
    sizes: list[tuple[int, ...]] = []
    seen: Any = net[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(tuple(inputs[0].shape)))
    scores_and_gradient(model, chosen, image, SHORTCUTS)
    seen.remove()
    assert sizes[-1][0] == 3
    assert sizes[-1][-1] <= (17 if path == ".5" else 25)


def test_what_sees_the_whole_picture_is_not_cropped() -> None:
    model = ph.load(with_random_statistics(lambda: models.efficientnet_b0(weights=None)), input_size=64)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert_shortcuts_agree(model, ph.neuron("features.3.1.block.3.0", 2), image)  # squeeze-and-excitation comes before
