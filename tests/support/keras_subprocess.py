"""Recording a Keras training on another backend than torch: `KERAS_BACKEND=jax python keras_subprocess.py FOLDER`.

A separate script, since Keras has only one backend in a process. It fails if something is not as expected.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKEND = os.environ["KERAS_BACKEND"]
assert "phosphene" not in sys.modules

import numpy as np  # noqa: E402
import torch  # noqa: E402

import phosphene as ph  # noqa: E402

assert "keras" not in sys.modules
import keras  # noqa: E402

from phosphene.errors import InvalidRequest  # noqa: E402
from phosphene.record_keras import KerasRecorder  # noqa: E402
from phosphene.training.keras_adapter import keras_network  # noqa: E402

assert ph.__name__ == "phosphene"
assert keras.config.backend() == BACKEND
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
# Keras has JAX compute much of a float64 network in float32; here it is to be float64 throughout
importlib.import_module("keras.src.backend.common.dtypes").BIT64_TO_BIT32_DTYPE["float64"] = "float64"
K: Any = keras.layers


def network() -> Any:
    """Return a network with a nested one, a frozen layer, a regulariser, BatchNorm and Dropout."""
    keras.utils.set_random_seed(3)
    photo = K.Input((8, 8, 3))
    value = K.Conv2D(4, (3, 2), padding="same", name="deep", kernel_regularizer=keras.regularizers.L2(1 / 32))(photo)
    value = K.Activation("tanh", name="smooth")(value)
    value = K.BatchNormalization(name="norm")(value)
    inner = keras.Model(photo, value, name="inner")
    whole = keras.Sequential(
        [
            K.Input((8, 8, 3)),
            inner,
            K.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            K.SeparableConv2D(3, 3, depth_multiplier=2, name="separable"),
            K.Conv2DTranspose(2, 3, name="transposed"),
            K.Conv2D(2, 3, name="frozen", trainable=False),
            K.Dropout(0.3, name="drop"),
            K.Flatten(name="flat"),
            K.Dense(3, activation="softmax", name="out"),
        ],
        name="whole",
    )
    # without XLA, whose compilation takes TensorFlow longer than the training; JAX needs it
    jit = "auto" if BACKEND == "jax" else False
    whole.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"], jit_compile=jit)
    return whole


def number(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).copy()


def loss_of(net: Any, images: Any, classes: Any) -> Any:
    """Return the total loss over all samples, written out."""
    scores = net(keras.ops.convert_to_tensor(images), training=False)
    entropy = -keras.ops.sum(keras.ops.log(scores) * keras.ops.convert_to_tensor(classes)) / len(images)
    return entropy + keras.ops.sum(net.get_layer("inner").get_layer("deep").kernel ** 2) / 32


def plain_gradients(net: Any, images: Any, classes: Any) -> list[Any]:
    """Return the gradient of each trainable weight: by a tape on TensorFlow, by central differences elsewhere."""
    if BACKEND == "tensorflow":
        with importlib.import_module("tensorflow").GradientTape() as tape:
            value = loss_of(net, images, classes)
        return [
            gradient.numpy() for gradient in tape.gradient(value, [weight.value for weight in net.trainable_weights])
        ]

    def loss_at(values: list[Any], fixed: list[Any]) -> Any:
        pairs = [*zip(net.trainable_variables, values), *zip(net.non_trainable_variables, fixed)]  # noqa: B905
        with keras.StatelessScope(state_mapping=pairs):
            return loss_of(net, images, classes)

    compiled = importlib.import_module("jax").jit(loss_at)
    fixed = [variable.value for variable in net.non_trainable_variables]
    start = [number(variable) for variable in net.trainable_variables]
    gradients, step = [], 1e-5
    for which, weight in enumerate(start):
        gradient = np.full(weight.size, np.nan)
        for entry in range(0, weight.size, max(1, weight.size // 6)):  # some entries of each
            values = []
            for sign in (1, -1):
                moved = [value.copy() for value in start]
                moved[which].flat[entry] += sign * step
                values.append(float(compiled(moved, fixed)))
            gradient[entry] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient.reshape(weight.shape))
    return gradients


def state_of(net: Any) -> list[Any]:
    """Return the values of all variables: weights, random generators, optimizer, metrics."""
    return [number(variable) for variable in (*net.variables, *net.optimizer.variables, *net.metrics_variables)]


class Plain(keras.callbacks.Callback):  # type: ignore[misc]
    """Computes after each epoch what is to be in the record."""

    def __init__(self, images: Any, classes: Any) -> None:
        super().__init__()
        self.data, self.gradients, self.kernels = (images, classes), [], []  # type: ignore[var-annotated]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.gradients.append(plain_gradients(self.model, *self.data))
        self.kernels.append({weight.path: number(weight) for weight in self.model.weights})


def trained(callbacks: list[Any], images: Any, classes: Any) -> Any:
    net = network()
    net.fit(images, classes, epochs=2, batch_size=4, shuffle=True, verbose=0, callbacks=callbacks)
    return net


def refused(call: Callable[[], Any]) -> str:
    """Return why a call is refused."""
    try:
        call()
    except InvalidRequest as error:
        return str(error)
    raise AssertionError("it was not refused")


def check(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images, classes = rng.random((8, 8, 8, 3)), np.eye(3)[rng.integers(0, 3, 8)]

    why = refused(lambda: KerasRecorder(folder / "no"))
    assert f"on Keras' {BACKEND} backend" in why, why
    assert "give gradients='epoch' with data=, or gradients=None" in why, why

    plain = Plain(images, classes)
    batches = [(images[:6], classes[:6]), (torch.from_numpy(images[6:]), torch.from_numpy(classes[6:]))]
    recorder = KerasRecorder(folder / "run", gradients="epoch", data=batches)
    net = trained([recorder, plain], images, classes)
    history = recorder.history
    assert history is not None
    assert history.epochs == [0, 1]
    assert history.layers == ["inner/deep", "depthwise", "separable", "transposed", "frozen"], history.layers
    assert history.weights == [weight.path for weight in net.trainable_weights]
    assert set(history.metrics(1)) == {"loss", "accuracy"}

    for epoch in (0, 1):
        recorded = zip(history.weights, history.gradients(epoch).values(), plain.gradients[epoch], strict=True)
        for name, gradient, by_hand in recorded:
            computed = ~np.isnan(by_hand)
            assert gradient.dtype == torch.float64
            assert computed.any()
            error = np.abs(gradient.numpy() - by_hand)[computed].max()
            assert error < (1e-12 if BACKEND == "tensorflow" else 1e-9), (name, error)
        weights = plain.kernels[epoch]
        deep = next(weight for path, weight in weights.items() if path.endswith("deep/kernel"))
        assert np.array_equal(history.kernels("inner/deep", epoch).weights.numpy(), deep.transpose(3, 2, 0, 1))
        depthwise = next(weight for path, weight in weights.items() if path.endswith("depthwise/kernel"))
        kernels = history.kernels("depthwise", epoch).weights.numpy()
        assert kernels.shape == (8, 1, 3, 3)
        assert np.array_equal(kernels[5, 0], depthwise[:, :, 2, 1])
        transposed = next(weight for path, weight in weights.items() if path.endswith("transposed/kernel"))
        assert np.array_equal(history.kernels("transposed", epoch).weights.numpy(), transposed.transpose(2, 3, 0, 1)), (
            epoch
        )
    assert not np.array_equal(plain.kernels[0]["whole/depthwise/kernel"], plain.kernels[1]["whole/depthwise/kernel"])

    alone = trained([], images, classes)
    assert all(np.array_equal(a, b) for a, b in zip(state_of(alone), state_of(net), strict=True))

    recorded_network = keras_network(net)
    before = state_of(net)
    mine = recorded_network.total_gradient(
        (images, classes), lambda outputs, targets: keras.ops.mean((outputs - targets) ** 2)
    )
    assert any(bool(gradient.any()) for gradient in mine.values())
    assert all(np.array_equal(a, b) for a, b in zip(before, state_of(net), strict=True))
    assert recorded_network.model is None
    assert not recorded_network.has_grad
    if BACKEND == "tensorflow":
        theirs = recorded_network.total_gradient((images, classes), keras.losses.MeanSquaredError())
        assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=1e-15) for name in mine)
        data = importlib.import_module("tensorflow").data.Dataset.from_tensor_slices((images, classes)).batch(3)
        again = recorded_network.total_gradient(data, keras.losses.MeanSquaredError())
        assert all(torch.allclose(again[name], theirs[name], rtol=0, atol=1e-14) for name in theirs)
        assert "have no end" in refused(lambda: recorded_network.total_gradient(data.repeat(), None))
    film = KerasRecorder(folder / "film", gradients=None, filters="inner/deep:0")
    assert "filters are rendered with PyTorch" in refused(lambda: net.fit(images, classes, verbose=0, callbacks=[film]))


if __name__ == "__main__":
    check(Path(sys.argv[1]))
