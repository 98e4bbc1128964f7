"""Keras models by file, by name and as objects: handles, weights, refusals, and the backend that is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from keras_networks import K, image_of, keras, nhwc, randomised, small
from phosphene.errors import ExtraMissing, InvalidRequest, ModelNotFound, ModelRefused, WeightsRefused
from phosphene.network.loading import load
from phosphene.network.loading.keras import preprocessing_of
from phosphene.network.preprocessing import Preprocessing

DATA = Path(__file__).parents[2] / "data/keras"


def cats_and_dogs() -> Any:
    """Return the network of reference system R4.1."""
    layers: list[Any] = [K.Input((150, 150, 3))]
    for number, width in enumerate((32, 64, 128, 128), 1):
        layers += [
            K.Conv2D(width, 3, activation="relu", name=f"conv2d_{number}"),
            K.MaxPooling2D(2, name=f"max_{number}"),
        ]
    layers += [K.Flatten(), K.Dropout(0.5), K.Dense(512, activation="relu"), K.Dense(1, activation="sigmoid")]
    return keras.Sequential(layers)


def cats_and_dogs_torch(network: Any) -> nn.Module:
    """Return the convolutions of the same network written in PyTorch, with the same weights and names."""
    whole, channels = nn.Sequential(), 3
    for number, width in enumerate((32, 64, 128, 128), 1):
        conv = nn.Conv2d(channels, width, 3)
        kernel, bias = network.get_layer(f"conv2d_{number}").get_weights()
        conv.weight.data.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        cast(Tensor, conv.bias).data.copy_(torch.from_numpy(bias))
        whole.add_module(f"conv2d_{number}", nn.Sequential(conv, nn.ReLU()))
        whole.add_module(f"max_{number}", nn.MaxPool2d(2))
        channels = width
    return whole


@pytest.fixture(scope="module")
def r4() -> Any:
    keras.utils.set_random_seed(1)
    return cats_and_dogs()


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_the_cats_and_dogs_network_at_all_eight_layers(r4: Any, ending: str, tmp_path: Path) -> None:
    r4.save(tmp_path / f"cats.{ending}")
    model = load(str(tmp_path / f"cats.{ending}"))
    assert sum(weight.numel() for weight in model.module.parameters() if weight.is_floating_point()) == 3_453_121
    assert (model.input_size, model.channels_in, model.logits) == ((150, 150), 3, "dense_1#preactivation")
    image = image_of(model)
    paths = [layer.path for layer in model.layers()][:8]
    with model.reading(paths) as read, torch.no_grad():
        acts = read(image)
    tapped = keras.Model(r4.inputs, [layer.output for layer in r4.layers[:8]])
    expected = tapped(nhwc(image), training=False)
    shapes = [(32, 148), (32, 74), (64, 72), (64, 36), (128, 34), (128, 17), (128, 15), (128, 7)]
    for path, output, (channels, side) in zip(paths, expected, shapes, strict=True):
        assert acts[path].shape == (1, channels, side, side)
        assert output.shape == (1, side, side, channels)
        assert torch.equal(acts[path].permute(0, 2, 3, 1), output)
    fields = [str(layer.receptive_field) for layer in model.layers()[:8]]
    assert fields == ["3 / 1 / 0", "4 / 2 / 0", "8 / 2 / 0", "10 / 4 / 0", "18 / 4 / 0", "22 / 8 / 0",
                      "38 / 8 / 0", "46 / 16 / 0"]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "twin"), [("conv2d_2", "conv2d_2"), ("max_3", "max_3"), ("conv2d_3#preactivation", "conv2d_3.0")]
)
def test_pictures_equal_those_of_the_same_network_in_torch(r4: Any, address: str, twin: str) -> None:
    """From noise where the name of the layer, of which the noise follows, is the same; from a photo otherwise."""
    models = load(r4), load(cats_and_dogs_torch(r4), input_size=150)
    photo = None if address == twin else image_of(models[0])[..., :64, :64]
    channels = [0, 5] if photo is None else [5]
    ours, theirs = (
        ph.render(model, ph.channel(path, channels), "rms", size=64, steps=6, photo=photo, precision="fp32")
        for model, path in zip(models, (address, twin), strict=True)
    )
    assert torch.allclose(ours.images, theirs.images, rtol=0, atol=1e-5)
    assert torch.allclose(ours.scores, theirs.scores, rtol=1e-4)
    assert torch.equal(ours.dead, theirs.dead)
    assert ((ours.scores > ours.start_scores) | ours.dead).all()
    assert not ours.dead.all()


@pytest.mark.parametrize("kind", ["Softmax", "Activation", "Dense", "sigmoid"])
def test_the_logits_are_found_before_the_last_softmax_or_sigmoid(kind: str) -> None:
    ends = {
        "Softmax": [K.Dense(3, name="scores"), K.Softmax(name="end")],
        "Activation": [K.Dense(3, name="scores"), K.Activation("softmax", name="end")],
        "Dense": [K.Dense(3, name="scores")],
        "sigmoid": [K.Dense(1, activation="sigmoid", name="scores")],
    }
    addresses = {"Softmax": "end#input", "Activation": "end#input", "Dense": "", "sigmoid": "scores#preactivation"}
    network = randomised(keras.Sequential([K.Input((6, 6, 1)), K.Flatten(), *ends[kind]]))
    model = load(network)
    assert model.logits == addresses[kind]
    image = image_of(model, 2)
    scores = network.get_layer("scores")
    by_hand = image.permute(0, 2, 3, 1).flatten(1) @ scores.kernel.value + scores.bias.value
    with model.reading([model.logits]) as read:
        assert torch.allclose(read(image)[model.logits], by_hand, atol=1e-6)


def test_grey_images_with_and_without_a_channel_axis() -> None:
    for shape in ((28, 28), (28, 28, 1)):
        layers = [K.Input(shape), K.Reshape((28, 28, 1)), K.Conv2D(3, 3, name="c"), K.Flatten(), K.Dense(2)]
        network = randomised(keras.Sequential(layers))
        model = load(network)
        assert (model.input_size, model.channels_in) == ((28, 28), 1)
        image = image_of(model)
        assert torch.equal(model.forward(image), network(image.reshape(1, *shape), training=False))
        pictures = ph.render(model, ph.channel("c", [0]), "fast", steps=3)
        assert pictures.images.shape[1] == 1
        assert (pictures.scores > pictures.start_scores).all()


def test_many_bands_and_sizes_that_the_network_leaves_open() -> None:
    network = keras.Sequential([K.Input((None, None, 5)), K.Conv2D(3, 3, name="c"), K.GlobalMaxPooling2D()])
    assert (load(network).channels_in, load(network).input_size) == (5, (224, 224))
    assert load(network, input_size=40).find("c").size == (38, 38)
    with pytest.raises(InvalidRequest, match="takes images of 5 channels, not 3"):
        load(network, channels_in=3)


def test_a_subclassed_network() -> None:
    class Mine(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = K.Conv2D(2, 3, activation="relu", name="first")
            self.rest = [K.Conv2D(3, 3, name="second"), K.GlobalAveragePooling2D(name="pool")]

        def call(self, image: Any) -> Any:
            image = self.first(image)
            for layer in self.rest:
                image = layer(image)
            return image

    network = Mine()
    with pytest.raises(ModelRefused, match="no values yet"):
        load(network)
    network(np.zeros((1, 16, 16, 3), "float32"))
    model = load(network, input_size=16)
    assert [layer.path for layer in model.layers()] == ["first", "second", "pool"]
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image)))


def test_photos_are_squashed_as_keras_does_by_default() -> None:
    photo = torch.rand(1, 3, 30, 60)
    image, region = load(small()).fitted(photo)
    assert image.shape == (1, 3, 12, 12)
    assert region == (0, 0, 30, 60)


def test_preprocessing_of_every_application_equals_its_own() -> None:
    pixels = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    seen = set()
    for name, maker in vars(keras.applications).items():
        module = getattr(maker, "__module__", "").split(".")[-1]
        if not callable(maker) or module in seen or name.startswith("_"):
            continue
        seen.add(module)
        preprocess_input = sys.modules[maker.__module__].preprocess_input
        expected = torch.as_tensor(preprocess_input(nhwc(pixels) * 255)).permute(0, 3, 1, 2)
        made = preprocessing_of(keras, maker)(pixels)
        assert torch.allclose(made, expected, atol=2e-5 * float(expected.abs().max())), name
    assert {"vgg16", "mobilenet_v2", "densenet", "efficientnet", "resnet"} <= seen
    assert preprocessing_of(keras, keras.applications.VGG16).bgr


def test_an_application_with_random_weights() -> None:
    model = load("keras/MobileNet", weights="none")
    assert (model.input_size, model.logits, len(model.labels)) == ((224, 224), "predictions#input", 1000)
    assert (model.ref, model.options, model.labels[281]) == (None, {"weights": "none"}, "tabby")
    assert model.notes == ("random weights: the pictures show the architecture, not anything learned",)
    assert model.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3)
    layer = model.find("conv1")
    assert (layer.size, layer.channels, layer.convolution) == ((112, 112), 32, True)
    assert load("keras/mobilenet", weights="none").fingerprint == model.fingerprint


def test_an_application_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(weights: Any) -> None:
        print("Downloading data from …")
        raise OSError("URL fetch failure on https://…: None -- [Errno -2] Name or service not known")

    fail.__module__ = keras.applications.VGG16.__module__
    monkeypatch.setattr(keras.applications, "VGG16", fail)
    with pytest.raises(ModelNotFound, match=r"keras/VGG16 could not be made .*URL fetch.*--weights none"):
        load("keras/VGG16")
    assert capsys.readouterr().out == ""
    with pytest.raises(ModelNotFound, match="the nearest are: VGG19, VGG16"):
        load("keras/VGG17")


def test_weights_by_file_and_random_weights(tmp_path: Path) -> None:
    network = small()
    network.save(tmp_path / "model.keras")
    randomised(network, seed=1).save_weights(tmp_path / "1.weights.h5")
    saved, filled = load(tmp_path / "model.keras"), load(tmp_path / "model.keras", weights=tmp_path / "1.weights.h5")
    assert filled.fingerprint == load(network).fingerprint != saved.fingerprint
    assert filled.notes[0] == f"weights from {tmp_path / '1.weights.h5'}"
    none = [load(tmp_path / "model.keras", weights="none") for _ in range(2)]
    assert none[0].fingerprint == none[1].fingerprint != saved.fingerprint
    assert "random weights" in none[0].notes[0]
    keras.Sequential([K.Input((4,)), K.Dense(2)]).save_weights(tmp_path / "wrong.weights.h5")
    refused = {"wrong.weights.h5": "does not fit", "none.h5": "there is no", "model.keras": "no weights file of Keras"}
    for name, text in refused.items():
        with pytest.raises(WeightsRefused, match=text):
            load(tmp_path / "model.keras", weights=tmp_path / name)
    with pytest.raises(ModelRefused, match="already has its weights"):
        load(network, weights="none")


def test_damaged_weights_are_named_by_the_layer() -> None:
    network = small()
    network.get_layer("c2").bias.value.data[2] = float("nan")
    with pytest.raises(WeightsRefused, match="c2/bias holds 1 values"):
        load(network)


def test_networks_that_take_no_picture() -> None:
    with pytest.raises(ModelRefused, match=r"takes inputs of shape \(784,\), not pictures"):
        load(keras.Sequential([K.Input((784,)), K.Dense(2)]))
    inputs = [K.Input((8, 8, 3)), K.Input((8, 8, 3))]
    with pytest.raises(ModelRefused, match="has 2 inputs"):
        load(keras.Model(inputs, K.Add()(inputs)))
    with pytest.raises(ModelRefused, match="no values yet"):
        load(keras.Sequential([K.Conv2D(2, 3)]))


def test_another_backend_is_named_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ModelRefused, match=r"backend jax.*KERAS_BACKEND=torch before the first import"):
        load(DATA / "keras-2.15-plain.h5")


def test_without_keras_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'phosphene\[keras\]'"):
        load("keras/VGG16")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'phosphene\[keras\]'"):
        load(DATA / "keras-2.15-plain.h5")


def test_the_backend_is_chosen_for_the_import_only() -> None:
    """A Keras that was not imported yet runs on torch, and what the environment says of it is as before."""
    code = (
        "import os, sys, phosphene; assert 'keras' not in sys.modules;"
        f"model = phosphene.load({str(DATA / 'keras-2.15-plain.keras')!r});"
        "print(os.environ['KERAS_BACKEND'], sys.modules['keras'].config.backend())"
    )
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "numpy torch\n"


@pytest.mark.parametrize("ending", ["fused", "separate"])
def test_a_heat_map_of_a_network_that_ends_in_softmax_is_that_of_the_logit(ending: str) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(4, 3, activation="relu", name="seen"), keras.layers.GlobalAveragePooling2D()]
    fused = {"activation": "softmax"} if ending == "fused" else {}
    layers += [keras.layers.Dense(3, name="out", **fused)]
    layers += [] if fused else [keras.layers.Activation("softmax")]
    network = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    photo = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    heat = ph.explain(load(network), photo, 1)
    assert heat.layer == "seen"
    # the mean over the map goes straight into the class scores, so that a channel's weight is the classifier's over 36
    acts = ph.activations(load(network), photo, "seen")["seen"]
    weight = torch.as_tensor(network.get_layer("out").get_weights()[0])[:, 1]
    torch.testing.assert_close(heat.map, (acts * weight.view(-1, 1, 1)).sum(0) / 36, rtol=1e-5, atol=1e-7)
    predicted = torch.as_tensor(network.predict(photo.permute(0, 2, 3, 1).numpy(), verbose=0))[0]
    assert [guess.probability for guess in heat.top] == pytest.approx(
        predicted.sort(descending=True)[0].tolist(), abs=1e-6
    )
