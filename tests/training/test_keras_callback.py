"""Watching a Keras network learn: what is recorded equals a plain loop, and the training is as it would be without."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest, LayerNotFound, ModelRefused
from phosphene.network.loading import load
from phosphene.network.loading.keras import import_keras
from phosphene.training.history import History
from phosphene.training.keras_adapter import keras_network, loss_scale

keras: Any = import_keras()  # on torch, before anything imports it otherwise
from phosphene.record_keras import KerasRecorder  # noqa: E402

K = keras.layers
SUPPORT = Path(__file__).parents[1] / "support"
CAPTION, HEAD = 12 + 2 * 24 + 4, 18  # pixels over a sheet of kernels: the caption, the numbers of the columns


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have Keras compute in float64: losses too, and what it brings down to float32 on torch, such as Dense."""
    dtypes = importlib.import_module("keras.src.backend.common.dtypes")
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    before = keras.config.floatx(), keras.config.dtype_policy()
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


def plain_gradients(network: Any, images: Any, classes: Any) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy over all samples, one at a time, of each trainable weight."""
    weights = [one.value for one in network.trainable_weights]
    sums = [torch.zeros_like(one) for one in weights]
    for image, wanted in zip(torch.from_numpy(images), torch.from_numpy(classes), strict=True):
        loss = -(network(image[None], training=False)[0].log() * wanted).sum()
        for total, slope in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += slope / len(images)
    return sums


class Plain(keras.callbacks.Callback):  # type: ignore[misc]
    """Computes after each epoch what is to be in the record, and keeps the kernels."""

    def __init__(self, images: Any, classes: Any) -> None:
        super().__init__()
        self.data = images, classes
        self.gradients: list[list[Tensor]] = []
        self.kernels: list[list[Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.gradients.append(plain_gradients(self.model, *self.data))
        self.kernels.append([self.model.get_layer(f"conv{one}").kernel.numpy().copy() for one in (1, 2, 3)])


def the_record(callback: KerasRecorder) -> History:
    assert callback.history is not None
    return callback.history


def equal(own: Tensor, expected: Tensor, within: float = 1e-9) -> bool:
    return own.dtype == torch.float64 and own.shape == expected.shape and float((own - expected).abs().max()) < within


# --- R2.2 -------------------------------------------------------------------------------------------------------------


def test_the_network_of_r2_records_4_by_16_gradients_equal_to_a_plain_loop(tmp_path: Path) -> None:
    network, data = flowers(224), pictures(6, 224)
    assert network.count_params() == 20_842
    assert sum(one.value.numel() for one in network.trainable_weights) == 20_802
    assert [type(one).__name__ for one in network.layers][4] == "Conv2D"
    plain = Plain(*data)
    recorder = KerasRecorder(tmp_path / "run", gradients="epoch", data=data)
    network.fit(*data, batch_size=4, epochs=4, verbose=0, callbacks=[recorder, plain])
    history = the_record(recorder)
    record = history.record()
    assert (len(record), {len(one) for one in record}) == (4, {16})
    for own, expected in zip(record, plain.gradients, strict=True):
        assert all(equal(one, other) for one, other in zip(own, expected, strict=True))
        assert all(bool(one.any()) for one in own)
    assert not equal(record[0][0], record[1][0], within=1e-6)
    assert history.weights == [one.path for one in network.trainable_weights]
    assert history.entry(0)["gradients"]["kind"] == "epoch"
    for epoch, kernels in enumerate(plain.kernels):
        for number, kernel in enumerate(kernels, 1):
            drawn = history.kernels(f"conv{number}", epoch).weights.numpy()
            assert np.array_equal(drawn, kernel.transpose(3, 2, 0, 1))


def test_the_kernel_sheet_of_layer_4_pixel_for_pixel(tmp_path: Path) -> None:
    """R2.2b: all kernels stretched together min..max to 0..1, a row for each of 10 filters, a column for 5 channels."""
    network, data = flowers(), pictures(8)
    recorder = KerasRecorder(tmp_path / "run", gradients=None)
    network.fit(*data, batch_size=4, epochs=2, verbose=0, callbacks=[recorder])
    layer = network.layers[4]
    kernel = layer.kernel.numpy()
    assert kernel.shape == (3, 3, 5, 10)
    stretched = (kernel - kernel.min()) / (kernel.max() - kernel.min())
    page = np.asarray(the_record(recorder).kernels(layer.name).grid(style="grey"))
    left = int(np.argmax((page[CAPTION + HEAD : CAPTION + HEAD + 3].astype(int) != 255).any(2).all(0)))
    tile = 48 + 1  # 3 weights, each 16 pixels wide, and a line
    for out in range(10):
        for channel in range(5):
            top, start = CAPTION + HEAD + out * tile, left + channel * tile
            drawn = page[top : top + 48, start : start + 48]
            grey = np.round(stretched[:, :, channel, out] * 255).astype(np.uint8)
            expected = np.stack([grey] * 3, -1).repeat(16, 0).repeat(16, 1)
            assert np.array_equal(drawn, expected)
    assert {stretched.min(), stretched.max()} == {0.0, 1.0}


# --- running gradients ------------------------------------------------------------------------------------------------


def by_hand(network: Any, data: tuple[Any, Any], epochs: int, batch: int, optimizer: Any) -> list[list[Tensor]]:
    """Train by a plain loop without shuffling; return each epoch's mean over batches of every gradient."""
    means = []
    weights = network.trainable_weights
    for _ in range(epochs):
        sums = [torch.zeros_like(one.value) for one in weights]
        starts = range(0, len(data[0]), batch)
        for start in starts:
            images, classes = (torch.from_numpy(one[start : start + batch]) for one in data)
            loss = network.compute_loss(images, classes, network(images, training=True))
            slopes = torch.autograd.grad(loss, [one.value for one in weights])
            for total, slope in zip(sums, slopes, strict=True):
                total += slope / len(starts)
            with torch.no_grad():
                optimizer.apply(list(slopes), weights)
        means.append(sums)
    return means


@pytest.mark.parametrize(
    ("options", "scaled"),
    [
        ({}, False),
        ({"clipnorm": 0.01}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"loss_scale_factor": 64.0}, False),
        ({}, True),
    ],
    ids=["plain", "clipped", "accumulated", "fixed scale", "dynamic scale"],
)
def test_running_gradients_are_the_mean_of_those_of_the_batches(
    options: dict[str, Any], scaled: bool, tmp_path: Path
) -> None:
    def optimizer() -> Any:
        return keras.optimizers.SGD(0.01, momentum=0.9, **options)

    whole = keras.optimizers.LossScaleOptimizer(optimizer(), 8.0, dynamic_growth_steps=2) if scaled else optimizer()
    data = pictures(10)
    recorder = KerasRecorder(tmp_path / "run")
    network = flowers(optimizer=whole)
    network.fit(*data, batch_size=3, epochs=3, shuffle=False, verbose=0, callbacks=[recorder])
    twin = flowers()
    options.pop("loss_scale_factor", None)
    expected = by_hand(twin, data, 3, 3, keras.optimizers.SGD(0.01, momentum=0.9, **options))
    if scaled:
        assert loss_scale(network) == 8 * 2**6  # doubled after every second of 12 steps
    history = the_record(recorder)
    assert history.epochs == [0, 1, 2]
    for own, other in zip(history.record(), expected, strict=True):
        assert len(own) == 16
        assert all(equal(one, two, 1e-11) for one, two in zip(own, other, strict=True))
    facts = history.entry(2)["gradients"]
    assert (facts["kind"], facts["read"], facts["batches"]) == ("running", "before clipping", 4)
    assert set(history.metrics(2)) == {"loss"}


@pytest.mark.slow
def test_a_compiled_training_step_leaves_the_same_gradients(tmp_path: Path) -> None:
    data = pictures(8)
    found = []
    for compiled in (False, True):
        recorder = KerasRecorder(tmp_path / str(compiled))
        network = flowers(optimizer=keras.optimizers.SGD(0.01), jit_compile=compiled)
        network.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[recorder])
        assert network.jit_compile is compiled
        found.append(the_record(recorder).record())
    for plain, compiled in zip(*found, strict=True):
        assert all(torch.allclose(one, two, rtol=0, atol=1e-9) for one, two in zip(plain, compiled, strict=True))


# --- the training is what it would be ---------------------------------------------------------------------------------


class Noise(K.Layer):  # type: ignore[misc, name-defined]
    """Adds noise drawn from Keras' own generator, when rendered too, and a loss."""

    def call(self, value: Any) -> Any:
        self.add_loss(keras.ops.mean(value**2) * 0.01)
        return value + 0.01 * keras.random.normal(keras.ops.shape(value))


def noisy(folder: Path | None, images: Any, classes: Any, **settings: Any) -> tuple[Any, Any]:
    """Return a network and its callback after a training in which much is drawn."""
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
    return [one.numpy().copy() for one in variables]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("gradients", ["running", "epoch", None])
def test_the_training_is_bit_identical_with_filters_rendered_in_between(gradients: str | None, tmp_path: Path) -> None:
    data = pictures(10, 12)
    alone, _ = noisy(None, *data)
    draws = random.random(), float(np.random.rand()), float(torch.rand(()))
    network, callback = noisy(tmp_path, *data, gradients=gradients, data=data, filters="c2:0:2")
    assert draws == (random.random(), float(np.random.rand()), float(torch.rand(())))
    assert all(np.array_equal(one, two) for one, two in zip(values_of(alone), values_of(network), strict=True))
    assert len(alone.losses) == len(network.losses)
    history = the_record(callback)
    assert history.epochs == [0, 1, 2]
    assert set(history.metrics(0)) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    films = [history.filters(epoch) for epoch in history.epochs]
    assert all(len(one) == 2 for one in films)
    assert len({one["filter_0"].tobytes() for one in films}) == 3
    assert set(history.gradients(1)) == (set(history.weights) if gradients else set())


def test_a_gradient_leaves_everything_as_it_was(untouched: Callable[..., Any]) -> None:
    data = pictures(4, 12)
    network, _ = noisy(None, *data)
    for one in network.trainable_weights:
        one.value.grad = torch.ones_like(one.value)
    subject = keras_network(network)
    values, losses = values_of(network), [id(one) for one in network.losses[:1]]
    with untouched(network):
        found = subject.total_gradient(data, None)
        with pytest.raises(ZeroDivisionError):
            subject.total_gradient(data, lambda outputs, targets: 1 // 0)
    assert all(np.array_equal(one, two) for one, two in zip(values, values_of(network), strict=True))
    assert [id(one) for one in network.losses[:1]] == losses
    assert all(bool((one.value.grad == 1).all()) for one in network.trainable_weights)
    assert list(found) == [one.path for one in network.trainable_weights]
    assert all(one.value is two for one, two in zip(network.trainable_weights, subject.weights().values(), strict=True))


# --- the total loss ---------------------------------------------------------------------------------------------------


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
    weights = rng_weights = np.random.default_rng(0).random(7)
    wanted = [one.value for one in network.trainable_weights]
    errors = (network(torch.from_numpy(images), training=False) - torch.from_numpy(classes)).square().mean(1)
    kernel, bias = network.get_layer("c").kernel.value, network.get_layer("out").bias.value
    regularisers = 0.25 * kernel.square().sum() + 0.5 * bias.abs().sum()
    expected = torch.autograd.grad(errors.mean() + regularisers, wanted, retain_graph=True)
    weighted = torch.autograd.grad((errors * torch.from_numpy(rng_weights)).mean() + regularisers, wanted)
    subject = keras_network(network)
    batches = [(images[:5], classes[:5]), (torch.from_numpy(images[5:]), torch.from_numpy(classes[5:]))]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.from_numpy, (images, classes))), 3)

    class Pairs(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> tuple[Any, Any]:
            return images[2 * number : 2 * number + 2], classes[2 * number : 2 * number + 2]

    for data in ((images, classes), [images, classes], batches, loader, Pairs()):
        found = subject.total_gradient(data, None)
        assert all(equal(one, two, 1e-13) for one, two in zip(found.values(), expected, strict=True))
    found = subject.total_gradient((images, classes, weights), None)
    assert all(equal(one, two, 1e-13) for one, two in zip(found.values(), weighted, strict=True))


def test_a_loss_that_is_given_is_all_of_the_loss() -> None:
    network = regular()
    images, classes = pictures(7, 6)
    wanted = [one.value for one in network.trainable_weights]
    outputs, targets = network(torch.from_numpy(images), training=False), torch.from_numpy(classes)
    expected = torch.autograd.grad((outputs.softmax(1).log() * targets).sum() / -7, wanted)
    subject = keras_network(network)

    def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    for loss in (entropy, keras.losses.CategoricalCrossentropy(from_logits=True)):
        found = subject.total_gradient((images, classes), loss)
        assert all(equal(one, two, 1e-12) for one, two in zip(found.values(), expected, strict=True))


def test_data_or_a_loss_that_will_not_do_is_refused() -> None:
    network, (images, classes) = regular(), pictures(4, 6)
    subject = keras_network(network)
    with pytest.raises(InvalidRequest, match="regular is not compiled with a loss: compile it, or give loss="):
        subject.total_gradient((images, classes), None)
    network.compile("sgd", "mse")
    cases: list[tuple[Any, Any, str]] = [
        (((images, classes) for _ in range(2)), None, "can be gone through once an epoch"),
        ([], None, "held no sample"),
        ((images, classes[:3]), None, r"differ in length: \[3, 4\] samples"),
        ([(images, classes, classes, classes)], None, "not 4 things"),
        ((images, classes), "mse", "not 'mse'"),
        ((images, classes), lambda outputs, targets: (outputs - targets) ** 2, r"returned a Tensor of shape \(4, 17\)"),
    ]
    for data, loss, why in cases:
        with pytest.raises(InvalidRequest, match=why):
            subject.total_gradient(data, loss)


# --- which layers and weights -----------------------------------------------------------------------------------------


def test_nested_networks_frozen_layers_and_weights_of_one_path(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    photo = K.Input((10, 10, 3))
    inner = keras.Model(photo, K.Conv2D(3, 3, name="deep")(photo), name="inner")
    branches = [K.Conv2D(4, 3, name="twin"), K.DepthwiseConv2D(3, depth_multiplier=2, name="wide")]
    twin = keras.Sequential([K.Input((8, 8, 3)), branches[0]], name="a")
    other = keras.Sequential([K.Input((8, 8, 3)), K.Conv2D(2, 3, name="twin"), branches[1]], name="a_")
    start = K.Input((10, 10, 3))
    value = inner(start)
    joined = K.Concatenate(name="both")([K.Flatten(name="f1")(twin(value)), K.Flatten(name="f2")(other(value))])
    network = keras.Model(start, K.Dense(17, activation="softmax", name="out")(joined), name="nest")
    network.compile("adam", "categorical_crossentropy")
    inner.trainable = False
    recorder = KerasRecorder(tmp_path / "run")
    network.fit(*pictures(6, 10), batch_size=3, epochs=1, verbose=0, callbacks=[recorder])
    history, model = the_record(recorder), load(network)
    assert history.layers == list(keras_network(network).kernels)
    assert set(history.layers) == {one.path for one in model.layers().convolutions}
    assert history.layers == ["inner/deep", "a/twin", "a_/twin", "a_/wide"]
    for path in history.layers:
        expected = model.layout.kernel(model.modules[path])
        assert expected is not None
        assert torch.equal(history.kernels(path).weights, expected.detach())
    assert not any("deep" in one for one in history.weights)
    assert len(set(history.weights)) == len(network.trainable_weights) == 8
    assert list(history.gradients()) == history.weights
    recorder = KerasRecorder(tmp_path / "some", layers="*wide")
    network.fit(*pictures(3, 10), epochs=1, verbose=0, callbacks=[recorder])
    assert the_record(recorder).layers == ["a_/wide"]
    with pytest.raises(LayerNotFound, match="inner/deep, a/twin, a_/twin, a_/wide"):
        network.fit(*pictures(3, 10), verbose=0, callbacks=[KerasRecorder(tmp_path / "no", layers="block*")])


def test_two_weights_of_one_path_have_names_of_their_own() -> None:
    photo = K.Input((6, 6, 3))
    value = K.Conv2D(2, 3, name="same")(photo)
    inner = K.Input((4, 4, 2))
    nested = keras.Model(inner, K.Conv2D(2, 3, name="same")(inner), name="nested")
    network = keras.Model(photo, nested(value))
    assert [one.path for one in network.trainable_weights].count("same/kernel") == 2
    names = ["same/kernel", "same/bias", "same/kernel@2", "same/bias@2"]
    assert list(keras_network(network).weights()) == names
    network.layers[1].trainable = False
    assert list(keras_network(network).weights()) == names[2:]


def test_a_training_goes_on_with_its_record(tmp_path: Path) -> None:
    data = pictures(6)
    network = flowers()
    for start, end in ((0, 2), (2, 4)):
        recorder = KerasRecorder(tmp_path / "run", cap=2_000_000)
        network.fit(*data, batch_size=3, initial_epoch=start, epochs=end, verbose=0, callbacks=[recorder])
        assert recorder.recorder is None
        assert the_record(recorder).epochs == list(range(end))
    last = the_record(recorder).kernels("conv1").weights
    assert torch.equal(last, network.get_layer("conv1").kernel.value.detach().permute(3, 2, 0, 1))
    with pytest.raises(InvalidRequest, match="cap"):
        network.fit(*data, epochs=90_000, verbose=0, callbacks=[KerasRecorder(tmp_path / "long", cap=2_000_000)])


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(ModelRefused, match="has no weights yet; build it"):
        keras_network(keras.Sequential([K.Conv2D(2, 3)], name="empty"))


# --- other backends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_on_another_backend(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    settings = {
        "KERAS_BACKEND": backend,
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, str(SUPPORT / "keras_subprocess.py"), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_keras_the_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['keras'] = None; import phosphene, phosphene.record_keras"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ExtraMissing: keras is not installed; install it with: pip install 'phosphene[keras]'" in done.stderr
