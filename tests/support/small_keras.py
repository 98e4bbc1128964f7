"""Small Keras networks on the torch backend, in float64, and their training."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene.network.loading.keras import import_keras

keras: Any = import_keras()  # on torch, before anything imports it otherwise
from phosphene.record_keras import KerasRecorder as KerasRecorder  # noqa: E402

K = keras.layers


@contextmanager
def float64() -> Iterator[None]:
    """Have Keras compute in float64: losses too, and what it reduces to float32 on torch, such as Dense."""
    dtypes = importlib.import_module("keras.src.backend.common.dtypes")
    before = keras.config.floatx(), keras.config.dtype_policy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def flowers(side: int = 24, optimizer: Any = None, **options: Any) -> Any:
    """Return the network of reference system R2.3, on smaller pictures."""
    keras.utils.set_random_seed(1)
    layers: list[Any] = [K.Input((side, side, 3))]
    for number, width in enumerate((5, 10, 5), 1):
        layers += [
            K.Conv2D(width, 3, padding="same", name=f"conv{number}"),
            K.ReLU(name=f"relu{number}"),
            K.MaxPooling2D(2, 2, name=f"pool{number}"),
            K.BatchNormalization(name=f"norm{number}"),
        ]
    layers += [K.Flatten(name="flat"), K.Dense(5, name="hidden"), K.ReLU(name="relu4"), K.Dense(17, name="classes")]
    network = keras.Sequential([*layers, K.Softmax(name="softmax")], name="flowers")
    network.compile(optimizer or keras.optimizers.Adam(0.003), "categorical_crossentropy", **options)
    return network


def pictures(count: int, side: int = 24) -> tuple[Any, Any]:
    """Return pictures (n, side, side, 3) in [0, 1] and their classes (n, 17)."""
    rng = np.random.default_rng(7)
    return rng.random((count, side, side, 3)), np.eye(17)[rng.integers(0, 17, count)]


class Noise(K.Layer):  # type: ignore[misc, name-defined]
    """Adds noise drawn from Keras' own generator, also when it is rendered, and a loss."""

    def call(self, value: Any) -> Any:
        self.add_loss(keras.ops.mean(value**2) * 0.01)
        return value + 0.01 * keras.random.normal(keras.ops.shape(value))


def noisy(folder: Path | None, images: Any, classes: Any, **settings: Any) -> tuple[Any, Any]:
    """Return a network and its callback after a training that draws many random numbers."""
    keras.utils.set_random_seed(5)
    network = keras.Sequential(
        [
            K.Input((12, 12, 3)),
            K.Conv2D(4, 3, name="c1", activation="relu"),
            K.BatchNormalization(name="n1"),
            K.Dropout(0.4, name="d1"),
            Noise(name="noise"),
            K.Conv2D(3, 3, name="c2", activation="relu"),
            K.Flatten(name="flat"),
            K.Dense(17, activation="softmax", name="out"),
        ],
        name="noisy",
    )
    network.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"])
    callback = None if folder is None else KerasRecorder(folder, **settings)
    network.fit(
        images,
        classes,
        batch_size=4,
        epochs=3,
        verbose=0,
        validation_data=(images[:4], classes[:4]),
        callbacks=[callback] if callback else [],
    )
    return network, callback


def values_of(network: Any) -> list[Any]:
    variables = (*network.variables, *network.optimizer.variables, *network.metrics_variables)
    return [variable.numpy().copy() for variable in variables]


def equal(a: Tensor, b: Tensor, within: float = 1e-9) -> bool:
    return a.dtype == torch.float64 and a.shape == b.shape and float((a - b).abs().max()) < within
