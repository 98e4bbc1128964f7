"""Keras networks with weights drawn at random, and images for them; importing this puts Keras on torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import phosphene as ph
from phosphene.network.loading.keras import import_keras

keras: Any = import_keras()
K = keras.layers


def randomised(network: Any, seed: int = 0) -> Any:
    """Return a network with every weight drawn anew, biases and statistics too."""
    rng = np.random.default_rng(seed)
    weights = []
    for weight in network.get_weights():
        drawn = rng.uniform(0.1, 0.5, weight.shape)
        weights.append(drawn * np.sign(rng.normal(size=weight.shape)) if weight.ndim > 1 else drawn)
    network.set_weights(weights)
    return network


def image_of(model: ph.Model, batch: int = 1) -> Tensor:
    """Return images (b, c, h, w) in [0, 1] for a model."""
    return torch.rand(batch, model.channels_in, *model.input_size, generator=torch.Generator().manual_seed(3))


def small(**options: Any) -> Any:
    """Return a network with fused, separate and object activations, BatchNorm and Dropout, ending in softmax."""
    return randomised(
        keras.Sequential(
            [
                K.Input((12, 12, 3)),
                K.Conv2D(4, 3, activation="relu", name="c1"),
                K.BatchNormalization(name="b1"),
                K.Conv2D(5, 3, padding="same", strides=2, activation=K.LeakyReLU(negative_slope=0.3), name="c2"),
                K.Dropout(0.5, name="d"),
                K.DepthwiseConv2D(3, depth_multiplier=2, name="dw", **options),
                K.Activation("relu", name="act"),
                K.Flatten(name="f"),
                K.Dense(3, activation="softmax", name="out"),
            ],
            name="small",
        )
    )


def nhwc(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).contiguous()
