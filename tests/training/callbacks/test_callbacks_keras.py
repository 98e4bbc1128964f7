"""Watching a Keras network learn: what is recorded equals a plain loop, and the training is as it would be without."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.rendering.recipes import find_recipe
from phosphene.training.history import History
from phosphene.training.keras_adapter import loss_scale
from small_keras import KerasRecorder, equal, float64, flowers, keras, noisy, pictures, values_of

SUPPORT = Path(__file__).parents[2] / "support"
CAPTION, HEAD = 12 + 2 * 24 + 4, 18  # pixels over a sheet of kernels: the caption, the numbers of the columns


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64():
        yield


def plain_gradients(network: Any, images: Any, classes: Any) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy over all samples, one at a time, of each trainable weight."""
    weights = [weight.value for weight in network.trainable_weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    for image, target in zip(torch.from_numpy(images), torch.from_numpy(classes), strict=True):
        loss = -(network(image[None], training=False)[0].log() * target).sum()
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient / len(images)
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
        self.kernels.append([self.model.get_layer(f"conv{number}").kernel.numpy().copy() for number in (1, 2, 3)])


def the_record(callback: KerasRecorder) -> History:
    assert callback.history is not None
    return callback.history


def test_the_network_of_r2_records_4_by_16_gradients_equal_to_a_plain_loop(tmp_path: Path) -> None:
    network, data = flowers(224), pictures(3, 224)
    assert network.count_params() == 20_842
    assert sum(weight.value.numel() for weight in network.trainable_weights) == 20_802
    assert [type(layer).__name__ for layer in network.layers][4] == "Conv2D"
    plain = Plain(*data)
    recorder = KerasRecorder(tmp_path / "run", gradients="epoch", data=data)
    network.fit(*data, batch_size=2, epochs=4, verbose=0, callbacks=[recorder, plain])
    history = the_record(recorder)
    record = history.record()
    assert (len(record), {len(gradients) for gradients in record}) == (4, {16})
    for gradients, expected in zip(record, plain.gradients, strict=True):
        assert all(equal(a, b) for a, b in zip(gradients, expected, strict=True))
        assert all(bool(gradient.any()) for gradient in gradients)
    assert not equal(record[0][0], record[1][0], within=1e-6)
    assert history.weights == [weight.path for weight in network.trainable_weights]
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


def by_hand(network: Any, data: tuple[Any, Any], epochs: int, batch: int, optimizer: Any) -> list[list[Tensor]]:
    """Train by a plain loop without shuffling; return each epoch's mean over batches of every gradient."""
    means = []
    weights = network.trainable_weights
    for _ in range(epochs):
        sums = [torch.zeros_like(weight.value) for weight in weights]
        starts = range(0, len(data[0]), batch)
        for start in starts:
            images, classes = (torch.from_numpy(array[start : start + batch]) for array in data)
            loss = network.compute_loss(images, classes, network(images, training=True))
            gradients = torch.autograd.grad(loss, [weight.value for weight in weights])
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient / len(starts)
            with torch.no_grad():
                optimizer.apply(list(gradients), weights)
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

    scaling = keras.optimizers.LossScaleOptimizer(optimizer(), 8.0, dynamic_growth_steps=2) if scaled else optimizer()
    data = pictures(10)
    recorder = KerasRecorder(tmp_path / "run")
    network = flowers(optimizer=scaling)
    network.fit(*data, batch_size=3, epochs=3, shuffle=False, verbose=0, callbacks=[recorder])
    twin = flowers()
    options.pop("loss_scale_factor", None)
    expected = by_hand(twin, data, 3, 3, keras.optimizers.SGD(0.01, momentum=0.9, **options))
    if scaled:
        assert loss_scale(network) == 8 * 2**6  # doubled after every second of 12 steps
    history = the_record(recorder)
    assert history.epochs == [0, 1, 2]
    for gradients, means in zip(history.record(), expected, strict=True):
        assert len(gradients) == 16
        assert all(equal(a, b, 1e-11) for a, b in zip(gradients, means, strict=True))
    facts = history.entry(2)["gradients"]
    assert (facts["kind"], facts["read"], facts["batches"]) == ("running", "before clipping", 4)
    assert set(history.metrics(2)) == {"loss"}


@pytest.mark.slow
def test_a_compiled_training_step_leaves_the_same_gradients(tmp_path: Path) -> None:
    data = pictures(8)
    records = []
    for compiled in (False, True):
        recorder = KerasRecorder(tmp_path / str(compiled))
        network = flowers(optimizer=keras.optimizers.SGD(0.01), jit_compile=compiled)
        network.fit(*data, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[recorder])
        assert network.jit_compile is compiled
        records.append(the_record(recorder).record())
    for plain, compiled in zip(*records, strict=True):
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(plain, compiled, strict=True))


@pytest.fixture(scope="module")
def unwatched() -> tuple[list[Any], int, tuple[float, float, float]]:
    """Return variables and number of losses after a training without a recorder, and the next random numbers."""
    with float64():
        network, _ = noisy(None, *pictures(10, 12))
        return values_of(network), len(network.losses), random_numbers()


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("gradients", ["running", "epoch", None])
def test_the_training_is_bit_identical_with_filters_rendered_in_between(
    gradients: str | None, unwatched: Any, tmp_path: Path
) -> None:
    data, recipe = pictures(10, 12), find_recipe("fast").with_settings(12, 8)
    network, callback = noisy(tmp_path, *data, gradients=gradients, data=data, filters="c2:0:2", recipe=recipe)
    values, losses, numbers = unwatched
    assert numbers == random_numbers()
    assert all(np.array_equal(a, b) for a, b in zip(values, values_of(network), strict=True))
    assert losses == len(network.losses)
    history = the_record(callback)
    assert history.epochs == [0, 1, 2]
    assert set(history.metrics(0)) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    films = [history.filters(epoch) for epoch in history.epochs]
    assert all(len(film) == 2 for film in films)
    assert len({film["filter_0"].tobytes() for film in films}) == 3
    assert set(history.gradients(1)) == (set(history.weights) if gradients else set())


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
