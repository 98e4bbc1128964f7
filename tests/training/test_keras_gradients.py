"""The gradient of a Keras network's total loss: with all that regularises, and of every kind of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.training.keras_adapter import keras_network
from small_keras import K, equal, float64, keras, pictures


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64():
        yield


def regular() -> Any:
    """Return a small network whose layers add to the loss."""
    keras.utils.set_random_seed(2)
    layers = [
        K.Conv2D(2, 3, name="c", kernel_regularizer=keras.regularizers.L2(0.25), activation="tanh"),
        K.Flatten(name="flat"),
        K.Dense(17, name="out", bias_regularizer=keras.regularizers.L1(0.5)),
    ]
    network = keras.Sequential([K.Input((6, 6, 3)), *layers], name="regular")
    network.layers[-1].bias.assign(np.linspace(-1, 1.1, 17))
    return network


def test_the_total_loss_is_that_which_was_compiled_with_all_that_regularises() -> None:
    network = regular()
    network.compile("adam", keras.losses.MeanSquaredError())
    images, classes = pictures(7, 6)
    weights = np.random.default_rng(0).random(7)
    trainable = [weight.value for weight in network.trainable_weights]
    errors = (network(torch.from_numpy(images), training=False) - torch.from_numpy(classes)).square().mean(1)
    kernel, bias = network.get_layer("c").kernel.value, network.get_layer("out").bias.value
    regularisers = 0.25 * kernel.square().sum() + 0.5 * bias.abs().sum()
    expected = torch.autograd.grad(errors.mean() + regularisers, trainable, retain_graph=True)
    weighted = torch.autograd.grad((errors * torch.from_numpy(weights)).mean() + regularisers, trainable)
    recorded = keras_network(network)
    batches = [(images[:5], classes[:5]), (torch.from_numpy(images[5:]), torch.from_numpy(classes[5:]))]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.from_numpy, (images, classes))), 3)

    class Pairs(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> tuple[Any, Any]:
            return images[2 * number : 2 * number + 2], classes[2 * number : 2 * number + 2]

    for data in ((images, classes), [images, classes], batches, loader, Pairs()):
        gradients = recorded.total_gradient(data, None)
        assert all(equal(a, b, 1e-13) for a, b in zip(gradients.values(), expected, strict=True))
    gradients = recorded.total_gradient((images, classes, weights), None)
    assert all(equal(a, b, 1e-13) for a, b in zip(gradients.values(), weighted, strict=True))


def test_a_loss_that_is_given_is_all_of_the_loss() -> None:
    network = regular()
    images, classes = pictures(7, 6)
    trainable = [weight.value for weight in network.trainable_weights]
    outputs, targets = network(torch.from_numpy(images), training=False), torch.from_numpy(classes)
    expected = torch.autograd.grad((outputs.softmax(1).log() * targets).sum() / -7, trainable)
    recorded = keras_network(network)

    def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    for loss in (entropy, keras.losses.CategoricalCrossentropy(from_logits=True)):
        gradients = recorded.total_gradient((images, classes), loss)
        assert all(equal(a, b, 1e-12) for a, b in zip(gradients.values(), expected, strict=True))


def test_data_or_a_loss_that_will_not_do_is_refused() -> None:
    network, (images, classes) = regular(), pictures(4, 6)
    recorded = keras_network(network)
    with pytest.raises(InvalidRequest, match="regular is not compiled with a loss: compile it, or give loss="):
        recorded.total_gradient((images, classes), None)
    network.compile("sgd", "mse")
    cases: list[tuple[Any, Any, str]] = [
        (((images, classes) for _ in range(2)), None, "can be iterated once an epoch"),
        ([], None, "held no sample"),
        ((images, classes[:3]), None, r"differ in length: \[3, 4\] samples"),
        ([(images, classes, classes, classes)], None, "not 4 values"),
        ((images, classes), "mse", "not 'mse'"),
        ((images, classes), lambda outputs, targets: (outputs - targets) ** 2, r"returned a Tensor of shape \(4, 17\)"),
    ]
    for data, loss, why in cases:
        with pytest.raises(InvalidRequest, match=why):
            recorded.total_gradient(data, loss)
