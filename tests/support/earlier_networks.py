"""The networks of `tests/data/earlier`. Their weights are worked out, not drawn, so they are the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def ramp(*shape: int) -> Tensor:
    """Return numbers in sixteenths, which floating point holds exactly."""
    count = int(torch.tensor(shape).prod())
    return ((torch.arange(count) * 7 % 13 - 6) / 16).view(shape).float()


def images_of(count: int, side: int) -> Tensor:
    """Return images (n, 3, side, side) in [0, 1] that are all different."""
    return (torch.arange(count * 3 * side * side) * 37 % 251 / 250).view(count, 3, side, side).float()


def small() -> nn.Sequential:
    """Return two convolutions of 8 and 6 filters."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(ramp(*weight.shape))
    return network.eval()


def flowers() -> Any:
    """Return a Keras network of two convolutions and three classes, compiled."""
    import keras

    layers = keras.layers
    network = keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(4, 3, activation="relu", name="conv1"),
            layers.MaxPooling2D(2, name="pool"),
            layers.Conv2D(5, 3, activation="relu", name="conv2"),
            layers.GlobalAveragePooling2D(name="mean"),
            layers.Dense(3, activation="softmax", name="classes"),
        ],
        name="flowers",
    )
    network.set_weights([ramp(*weight.shape).numpy() for weight in network.weights])
    network.compile(keras.optimizers.SGD(0.01), "categorical_crossentropy")
    return network
