"""The variables of a Keras network: each has its own name, and all are restored after a gradient was taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from phosphene.training.keras_adapter import keras_network
from small_keras import K, float64, keras, noisy, pictures, values_of


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64():
        yield


def test_a_gradient_leaves_everything_as_it_was(untouched: Callable[..., Any]) -> None:
    data = pictures(4, 12)
    network, _ = noisy(None, *data)
    for weight in network.trainable_weights:
        weight.value.grad = torch.ones_like(weight.value)
    recorded = keras_network(network)
    values, losses = values_of(network), [id(loss) for loss in network.losses[:1]]
    with untouched(network):
        gradients = recorded.total_gradient(data, None)
        with pytest.raises(ZeroDivisionError):
            recorded.total_gradient(data, lambda outputs, targets: 1 // 0)
    assert all(np.array_equal(a, b) for a, b in zip(values, values_of(network), strict=True))
    assert [id(loss) for loss in network.losses[:1]] == losses
    assert all(bool((weight.value.grad == 1).all()) for weight in network.trainable_weights)
    assert list(gradients) == [weight.path for weight in network.trainable_weights]
    weights = recorded.weights().values()
    assert all(weight.value is tensor for weight, tensor in zip(network.trainable_weights, weights, strict=True))


def test_two_weights_of_one_path_have_names_of_their_own() -> None:
    photo = K.Input((6, 6, 3))
    value = K.Conv2D(2, 3, name="same")(photo)
    inner = K.Input((4, 4, 2))
    nested = keras.Model(inner, K.Conv2D(2, 3, name="same")(inner), name="nested")
    network = keras.Model(photo, nested(value))
    assert [weight.path for weight in network.trainable_weights].count("same/kernel") == 2
    names = ["same/kernel", "same/bias", "same/kernel@2", "same/bias@2"]
    assert list(keras_network(network).weights()) == names
    network.layers[1].trainable = False
    assert list(keras_network(network).weights()) == names[2:]
