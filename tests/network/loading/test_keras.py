"""Keras models as guests: the same numbers as Keras gives, at every layer, and the model left as it was."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import phosphene as ph
from phosphene.errors import ExtraMissing, InvalidRequest, LayerNotFound, ModelNotFound, ModelRefused, WeightsRefused
from phosphene.network.loading import load
from phosphene.network.loading.keras import import_keras, preprocessing_of
from phosphene.network.preprocessing import Preprocessing

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
DATA = Path(__file__).parents[2] / "data/keras"
keras: Any = import_keras()
K = keras.layers


def drawn(network: Any, seed: int = 0) -> Any:
    """Return a network with every weight drawn anew, biases and statistics too."""
    rng = np.random.default_rng(seed)
    network.set_weights([rng.uniform(0.1, 0.5, one.shape) * np.sign(rng.normal(size=one.shape)) if one.ndim > 1
                         else rng.uniform(0.1, 0.5, one.shape) for one in network.get_weights()])  # fmt: skip
    return network


def image_of(model: ph.Model, batch: int = 1) -> Tensor:
    """Return images (b, c, h, w) in [0, 1] for a model."""
    return torch.rand(batch, model.channels_in, *model.input_size, generator=torch.Generator().manual_seed(3))


def small(**options: Any) -> Any:
    """Return a network with fused, separate and object activations, BatchNorm and Dropout, ending in softmax."""
    return drawn(
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


# what each old version answered to the image of tests/data/keras/README.md
ANSWERS = {
    "keras-2.0.5-plain.hdf5": [0.23102040588855743],
    "keras-2.0.5-transfer.hdf5": [0.3869022727012634, 0.4213503301143646, 0.19174742698669434],
    "keras-2.0.5-frozen.hdf5": [0.1826646476984024, 0.564183235168457],
    "keras-2.3.1-plain.h5": [0.23102040588855743],
    "keras-2.3.1-transfer.h5": [0.31541141867637634, 0.3315947949886322, 0.35299381613731384],
    "keras-2.3.1-frozen.h5": [0.1826646476984024, 0.564183235168457],
    "keras-2.15-plain.h5": [0.23102030158042908],
    "keras-2.15-plain.keras": [0.23102030158042908],
    "keras-2.15-transfer.h5": [0.31541138887405396, 0.3315947949886322, 0.35299381613731384],
    "keras-2.15-transfer.keras": [0.31541138887405396, 0.3315947949886322, 0.35299381613731384],
    "keras-2.15-frozen.h5": [0.013185262680053711, 0.4657135307788849],
    "keras-2.15-frozen.keras": [0.013185262680053711, 0.4657135307788849],
    "tf-keras-2.21-transfer.keras": [0.31541138887405396, 0.3315947949886322, 0.35299381613731384],
    "tf-keras-2.21-frozen.keras": [0.013185262680053711, 0.4657135307788849],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_files_of_old_versions_answer_as_they_did_there(name: str) -> None:
    model = load(DATA / name, mean=[0], std=[1])
    height, width = model.input_size
    values = np.arange(height * width * 3).reshape(1, height, width, 3) * 37 % 256 / 255.0
    image = torch.from_numpy(values).float().permute(0, 3, 1, 2)
    assert model.forward(image)[0].tolist() == pytest.approx(ANSWERS[name], abs=2e-6)
    assert model.ref is None  # the file alone would come without the mean and deviation that were asked for
    with model.reading([one.path for one in model.layers()]) as read:
        assert len(read(image)) == len(model.layers())


def test_every_old_file_has_an_answer() -> None:
    assert {one.name for one in DATA.iterdir()} - {"README.md"} == set(ANSWERS)


def test_the_same_network_has_the_same_fingerprint_from_every_file() -> None:
    found = {load(DATA / name).fingerprint for name in ANSWERS if "plain" in name}
    assert len(found) == 1


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
    assert sum(one.numel() for one in model.module.parameters() if one.is_floating_point()) == 3_453_121
    assert (model.input_size, model.channels_in, model.logits) == ((150, 150), 3, "dense_1#preactivation")
    image = image_of(model)
    paths = [one.path for one in model.layers()][:8]
    with model.reading(paths) as read, torch.no_grad():
        acts = read(image)
    tapped = keras.Model(r4.inputs, [one.output for one in r4.layers[:8]])
    expected = tapped(nhwc(image), training=False)
    shapes = [(32, 148), (32, 74), (64, 72), (64, 36), (128, 34), (128, 17), (128, 15), (128, 7)]
    for path, own, (channels, side) in zip(paths, expected, shapes, strict=True):
        assert acts[path].shape == (1, channels, side, side)
        assert own.shape == (1, side, side, channels)
        assert torch.equal(acts[path].permute(0, 2, 3, 1), own)
    fields = [str(one.receptive_field) for one in model.layers()[:8]]
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


def test_every_layer_equals_keras_own_submodel() -> None:
    network = small()
    model = load(network)
    image = image_of(model, 2)
    own = keras.Model(network.inputs, [one.output for one in network.layers])(nhwc(image), training=False)
    paths = [one.path for one in model.layers()]
    assert paths == [one.name for one in network.layers]
    for path, expected in zip(paths, own, strict=True):
        with model.reading([path]) as read:
            act = read(image)[path]
        assert torch.equal(act if act.dim() == 2 else act.permute(0, 2, 3, 1), expected)


def test_gradients_are_right_at_every_layer() -> None:
    """The gradient of a class score at a layer equals that through Keras' own network from there on."""
    network = small()
    model = load(network)
    image = image_of(model, 2)
    for number, path in enumerate([one.path for one in model.layers()][:-2]):
        with model.reading([path, model.logits], roots=[path]) as read:
            acts = read(image)
            (gradient,) = torch.autograd.grad(acts[model.logits][:, 1].sum(), acts[path])
        rest = value = acts[path].detach().permute(0, 2, 3, 1).requires_grad_()
        for one in network.layers[number + 1 : -1]:
            rest = one(rest, training=False)
        score = (rest @ network.layers[-1].kernel.value + network.layers[-1].bias.value)[:, 1].sum()
        (expected,) = torch.autograd.grad(score, value)
        assert torch.allclose(gradient.permute(0, 2, 3, 1), expected, atol=1e-6 * float(expected.abs().max()))


def test_before_the_activation_and_after() -> None:
    network = small()
    model = load(network)
    image = image_of(model)
    paths = ["c1#preactivation", "c1", "c2#preactivation", "c2", "out#preactivation", "out", ""]
    with model.reading(paths) as read, torch.no_grad():
        acts = read(image)
    kernel, bias = (one.value for one in network.get_layer("c1").weights)
    by_hand = F.conv2d(image, kernel.permute(3, 2, 0, 1), bias)
    assert torch.allclose(acts["c1#preactivation"], by_hand, atol=1e-6)
    assert (acts["c1#preactivation"] < 0).any()
    assert torch.equal(acts["c1"], acts["c1#preactivation"].relu())
    assert torch.equal(acts["c2"], F.leaky_relu(acts["c2#preactivation"], 0.3))
    assert torch.equal(acts["out"], acts["out#preactivation"].softmax(1))
    assert torch.equal(acts["out"], acts[""])
    assert model.logits == "out#preactivation"


def test_before_the_activation_a_later_tensor_can_be_differentiated() -> None:
    model = load(small())
    image = image_of(model)
    with model.reading(["c1#preactivation", "c1"], roots=["c1#preactivation"]) as read:
        acts = read(image)
        (gradient,) = torch.autograd.grad(acts["c1"].sum(), acts["c1#preactivation"])
    assert torch.equal(gradient, (acts["c1#preactivation"] > 0).float())


def test_the_table_shows_fused_activations() -> None:
    table = load(small()).layers()
    assert [(one.path, one.kind) for one in table] == [
        ("c1", "Conv2D + relu"),
        ("b1", "BatchNormalization"),
        ("c2", "Conv2D + LeakyReLU"),
        ("d", "Dropout"),
        ("dw", "DepthwiseConv2D"),
        ("act", "Activation"),
        ("f", "Flatten"),
        ("out", "Dense + softmax"),
    ]
    assert [one.path for one in table.convolutions] == ["c1", "c2", "dw"]
    assert table.find("c1#preactivation").kind == "Conv2D"
    assert table.find("c1#preactivation").size == (10, 10)
    assert [one.path for one in table.matching("c*#pre*")] == ["c1#preactivation", "c2#preactivation"]
    assert [one.path for one in table.matching("c*")] == ["c1", "c2"]
    with pytest.raises(LayerNotFound, match="the nearest are: c1#preactivation"):
        table.find("c1#preactivatoin")


def test_nothing_is_left_behind(untouched: Untouched) -> None:
    network = small()
    network.get_layer("b1").trainable = False
    model = load(network)
    activations = [vars(one).get("activation", "none") for one in network.layers]
    variables = [one.numpy().copy() for one in network.variables]
    trainable = [one.trainable for one in network.variables]
    draws = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with untouched(model.module):
        model.layers()
        ph.render(model, ph.channel("c2#preactivation", [0]), "fast", steps=2, size=12)
        ph.render(model, ph.logit([0], model.logits), "fast", steps=2, size=12)
        reading = model.reading(["c1#preactivation", "out#preactivation"])
        with pytest.raises(ZeroDivisionError), reading as read:
            read(image_of(model))[1 // 0]
    assert [vars(one).get("activation", "none") for one in network.layers] == activations
    assert network.get_layer("c2").activation.name.startswith("leaky")
    assert all(np.array_equal(one.numpy(), before) for one, before in zip(network.variables, variables, strict=True))
    assert [one.trainable for one in network.variables] == trainable
    assert random.getstate() == draws[0]
    assert np.array_equal(np.random.get_state()[1], draws[1])  # type: ignore[index]
    assert all(not one._forward_hooks and not one._forward_pre_hooks for one in network.layers)
    assert all(one.requires_grad == flag for one, flag in ((v.value, v.trainable) for v in network.variables))


def test_what_a_layer_draws_or_adds_in_a_forward_pass_is_taken_back() -> None:
    class Noisy(K.Layer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(activity_regularizer="l2")
            self.seeds = keras.random.SeedGenerator(5)

        def call(self, value: Any) -> Any:
            return value + keras.random.normal(keras.ops.shape(value), seed=self.seeds)

    network = keras.Sequential([K.Input((8, 8, 3)), K.Conv2D(2, 3, name="c"), Noisy()])
    model = load(network)
    seeds, losses = network.layers[-1].seeds.state.numpy().copy(), len(network.losses)
    with model.reading(["c", ""]) as read:
        read(image_of(model))
        read(image_of(model))
    assert np.array_equal(network.layers[-1].seeds.state.numpy(), seeds)
    assert len(network.losses) == losses


def test_every_weight_is_frozen_while_it_is_read() -> None:
    network = small()
    model = load(network)
    with model.reading(["out"]) as read:
        assert not any(one.value.requires_grad for one in network.variables)
        assert not any(one.training for one in network.layers)
        assert not read(image_of(model))["out"].requires_grad
    assert network.layers[0].kernel.value.requires_grad


def test_nested_networks_are_addressed_through_their_holder() -> None:
    photo = K.Input((10, 10, 3))
    inner = keras.Model(photo, K.Conv2D(3, 3, name="deep", activation="relu")(photo), name="inner")
    base_in = K.Input((10, 10, 3))
    base = keras.Model(base_in, K.Conv2D(2, 3, name="late")(inner(base_in)), name="base")
    ends = [K.GlobalAveragePooling2D(name="pool"), K.Dense(2, name="out")]
    network = drawn(keras.Sequential([K.Input((10, 10, 3)), base, *ends]))
    model = load(network)
    paths = [one.path for one in model.layers()]
    assert paths == ["base/inner/deep", "base/inner", "base/late", "base", "pool", "out"]
    image = image_of(model)
    with model.reading(["base/inner/deep", "base/inner"]) as read:
        acts = read(image)
    assert torch.equal(nhwc(acts["base/inner/deep"]), inner(nhwc(image), training=False))
    assert torch.equal(acts["base/inner"], acts["base/inner/deep"])
    holders = ("base/inner/deep", "base/late", "out")
    assert set(model.module.state_dict()) == {f"{one}/{name}" for one in holders for name in ("kernel", "bias")}


def test_a_layer_that_runs_twice_has_an_address_for_each_call() -> None:
    photo = K.Input((9, 9, 2))
    shared = K.Conv2D(2, 3, padding="same", activation="relu", name="shared")
    network = drawn(keras.Model(photo, shared(shared(photo))))
    model = load(network)
    assert [one.path for one in model.layers()] == ["shared@0", "shared@1"]
    with model.reading(["shared@0", "shared@1#preactivation", "shared@1"]) as read:
        acts = read(image_of(model))
    assert torch.equal(acts["shared@1"], acts["shared@1#preactivation"].relu())
    kernel, bias = (one.value for one in shared.weights)
    by_hand = F.conv2d(acts["shared@0"], kernel.permute(3, 2, 0, 1), bias, padding=1)
    assert torch.allclose(acts["shared@1#preactivation"], by_hand, atol=1e-6)


@pytest.mark.parametrize("kind", ["Softmax", "Activation", "Dense", "sigmoid"])
def test_the_logits_are_found_before_the_last_softmax_or_sigmoid(kind: str) -> None:
    ends = {
        "Softmax": [K.Dense(3, name="scores"), K.Softmax(name="end")],
        "Activation": [K.Dense(3, name="scores"), K.Activation("softmax", name="end")],
        "Dense": [K.Dense(3, name="scores")],
        "sigmoid": [K.Dense(1, activation="sigmoid", name="scores")],
    }
    addresses = {"Softmax": "end#input", "Activation": "end#input", "Dense": "", "sigmoid": "scores#preactivation"}
    network = drawn(keras.Sequential([K.Input((6, 6, 1)), K.Flatten(), *ends[kind]]))
    model = load(network)
    assert model.logits == addresses[kind]
    image = image_of(model, 2)
    scores = network.get_layer("scores")
    by_hand = image.permute(0, 2, 3, 1).flatten(1) @ scores.kernel.value + scores.bias.value
    with model.reading([model.logits]) as read:
        assert torch.allclose(read(image)[model.logits], by_hand, atol=1e-6)


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid(), nn.LogSoftmax(1)])
def test_the_logits_of_a_torch_network_that_ends_in_probabilities(end: nn.Module, untouched: Untouched) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 4)
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), nn.Flatten(), linear, nn.Sequential(end, nn.Dropout()))
    model = load(network, input_size=4)
    image = image_of(model)
    with untouched(network):
        assert model.logits == "4.0#input"
        with model.reading(["2", "4.0#input"]) as read:
            acts = read(image)
        assert torch.allclose(acts["4.0#input"], linear(acts["2"]), atol=1e-6)
    assert load(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 1)), input_size=8).logits == ""


def test_kernels_are_those_that_reproduce_the_layer() -> None:
    layers = [
        K.Conv2D(4, (3, 2), use_bias=False, name="plain"),
        K.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise"),
        K.SeparableConv2D(5, 3, depth_multiplier=2, use_bias=False, name="separable"),
        K.Conv2DTranspose(3, 3, use_bias=False, name="transposed"),
        K.Conv2D(4, 1, groups=1, activation="relu", use_bias=False, name="one"),
        K.Flatten(),
        K.Dense(2),
    ]
    network = drawn(keras.Sequential([K.Input((14, 14, 3)), *layers]))
    model = load(network)
    names = ["plain", "depthwise", "separable", "transposed", "one#preactivation"]
    with model.reading(names) as read, torch.no_grad():
        acts = read(image_of(model))
    kernels = {name: model.layout.kernel(model.modules[name]) for name in names}
    assert [tuple(one.shape) for one in kernels.values() if one is not None] == [
        (4, 3, 3, 2), (8, 1, 3, 3), (5, 8, 3, 3), (3, 5, 3, 3), (4, 3, 1, 1),
    ]  # fmt: skip
    given: Tensor = image_of(model)
    for name in names:
        kernel = kernels[name]
        assert kernel is not None
        kernel = kernel.detach()
        if name == "transposed":
            made = F.conv_transpose2d(given, kernel.transpose(0, 1))
        else:
            made = F.conv2d(given, kernel, groups=given.shape[1] if name == "depthwise" else 1)
        assert torch.allclose(made, acts[name], atol=1e-5 * made.abs().max().item())
        given = acts[name]
    assert model.layout.kernel(model.modules["dense"] if "dense" in model.modules else network.layers[-1]) is None


def test_channels_first_networks_give_the_same_maps() -> None:
    def network(data_format: str) -> Any:
        shape = (3, 9, 9) if data_format == "channels_first" else (9, 9, 3)
        options = {"data_format": data_format}
        layers = [K.Conv2D(4, 3, activation="relu", name="a", **options), K.MaxPooling2D(2, name="b", **options)]
        return drawn(keras.Sequential([K.Input(shape), *layers, K.Conv2D(2, 2, name="c", **options)]))

    first, last = (load(network(one)) for one in ("channels_first", "channels_last"))
    assert (first.input_size, first.channels_in) == (last.input_size, last.channels_in) == ((9, 9), 3)
    image = image_of(first)
    for path in ("a", "b", "c"):
        with first.reading([path]) as one, last.reading([path]) as other:
            assert torch.allclose(one(image)[path], other(image)[path], atol=1e-6)
        assert first.find(path).receptive_field == last.find(path).receptive_field
    kernels = [one.layout.kernel(one.modules["a"]) for one in (first, last)]
    assert kernels[0] is not None
    assert kernels[1] is not None
    assert torch.equal(kernels[0], kernels[1])


def test_dead_filters_are_flagged_and_live_again_before_the_activation() -> None:
    network = drawn(keras.Sequential([K.Input((16, 16, 3)), K.Conv2D(2, 3, activation="relu", name="c")]))
    kernel, bias = network.layers[0].get_weights()
    bias[1] = -1000
    network.layers[0].set_weights([kernel, bias])
    model = load(network)
    dead = ph.render(model, ph.channel("c", [0, 1]), "fast", steps=3, size=16).dead
    assert dead.tolist() == [False, True]
    before = ph.render(model, ph.channel("c#preactivation", [1]), "fast", steps=8, size=16)
    assert before.dead.tolist() == [False]
    assert (before.scores > before.start_scores).all()


def test_grey_images_with_and_without_a_channel_axis() -> None:
    for shape in ((28, 28), (28, 28, 1)):
        layers = [K.Input(shape), K.Reshape((28, 28, 1)), K.Conv2D(3, 3, name="c"), K.Flatten(), K.Dense(2)]
        network = drawn(keras.Sequential(layers))
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
            for one in self.rest:
                image = one(image)
            return image

    network = Mine()
    with pytest.raises(ModelRefused, match="no values yet"):
        load(network)
    network(np.zeros((1, 16, 16, 3), "float32"))
    model = load(network, input_size=16)
    assert [one.path for one in model.layers()] == ["first", "second", "pool"]
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image)))


@pytest.mark.parametrize("steps", ["Rescaling", "nested", "arithmetic", "Normalization", "augmented"])
def test_a_network_that_scales_pixels_itself_gets_bytes(steps: str) -> None:
    photo = K.Input((8, 8, 3))
    if steps == "Rescaling":
        scaled = K.Rescaling(1 / 255)(photo)
    elif steps == "nested":
        scaled = keras.Sequential([K.Input((8, 8, 3)), K.Rescaling(1 / 127.5, offset=-1)])(photo)
    elif steps == "arithmetic":
        scaled = keras.applications.mobilenet_v2.preprocess_input(photo)
    elif steps == "Normalization":
        scaled = K.Normalization(mean=[120.0, 110.0, 100.0], variance=[9.0, 4.0, 1.0])(photo)
    else:
        scaled = K.Rescaling(1 / 255)(keras.Sequential([K.RandomFlip(), K.RandomRotation(0.1)])(photo))
    network = keras.Model(photo, K.Conv2D(2, 3)(scaled))
    model = load(network)
    image = image_of(model)
    assert model.notes == ("its first layer rescales pixels, so that it gets values of 0..255",)
    expected = network(nhwc(image) * 255, training=False).permute(0, 3, 1, 2)
    assert torch.allclose(model.layout.read(model.forward(image)), expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_does_not_gets_zero_to_one_and_says_so() -> None:
    photo = K.Input((8, 8, 3))
    for network in (
        keras.Model(photo, K.Conv2D(2, 3)(photo)),
        keras.Model(photo, K.Conv2D(2, 3)(K.Rescaling(2.0, offset=-1)(photo))),
        keras.Model(photo, K.Conv2D(2, 3)(K.Normalization(mean=0.5, variance=0.1)(photo))),
    ):
        model = load(network)
        assert "0..1" in model.notes[0]
        image = image_of(model)
        assert torch.equal(model.forward(image), network(nhwc(image), training=False))
    normalised = load(network, mean=[0.5, 0.4, 0.3], std=[0.2])
    assert normalised.preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.2,))
    assert normalised.notes == ()


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
        own = sys.modules[maker.__module__].preprocess_input
        expected = torch.as_tensor(own(nhwc(pixels) * 255)).permute(0, 3, 1, 2)
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
    drawn(network, seed=1).save_weights(tmp_path / "other.weights.h5")
    saved, other = load(tmp_path / "model.keras"), load(tmp_path / "model.keras", weights=tmp_path / "other.weights.h5")
    assert other.fingerprint == load(network).fingerprint != saved.fingerprint
    assert other.notes[0] == f"weights from {tmp_path / 'other.weights.h5'}"
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


def mark(value: Any) -> Any:
    """Leave a mark that it ran."""
    Path(os.environ["PHOSPHENE_TEST_MARK"]).write_text("ran")
    return value


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_lambda_layers_run_only_when_trusted(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "proof"
    monkeypatch.setenv("PHOSPHENE_TEST_MARK", str(proof))
    # what it calls must be in the function itself, for nothing else is saved
    code = lambda x: (__import__("os").makedirs(__import__("os").environ["PHOSPHENE_TEST_MARK"], exist_ok=True), x)[1]  # noqa: E731
    network = keras.Sequential([K.Input((6, 6, 3)), K.Conv2D(2, 3, name="c"), K.Lambda(code, name="mine")])
    network.save(tmp_path / f"model.{ending}")
    proof.rmdir()
    with pytest.raises(ModelRefused, match=r"needs the Lambda layer 'mine', .* --trust"):
        load(tmp_path / f"model.{ending}")
    assert not proof.exists()
    trusted = load(tmp_path / f"model.{ending}", trust=True)
    image = image_of(trusted)
    assert torch.equal(trusted.forward(image), network(nhwc(image)))
    assert proof.exists()


def test_custom_objects_are_refused_with_their_names(tmp_path: Path) -> None:
    class Twice(K.Layer):  # type: ignore[misc, name-defined]
        def call(self, value: Any) -> Any:
            return 2 * value

    network = keras.Sequential([K.Input((6, 6, 3)), Twice(name="mine"), K.Conv2D(2, 3, activation=mark)])
    for ending in ("keras", "h5"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PHOSPHENE_TEST_MARK", str(tmp_path / "proof"))
            network.save(tmp_path / f"model.{ending}")
        with pytest.raises(ModelRefused, match=r"the custom class Twice 'mine', the custom function 'mark'"):
            load(tmp_path / f"model.{ending}")
        with pytest.raises(ModelRefused, match=r"cannot load .*it needs the custom class Twice.* give the object"):
            load(tmp_path / f"model.{ending}", trust=True)


def test_custom_objects_of_a_trusted_file_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "phosphene_test_objects.py").write_text(
        "import keras\nclass Thrice(keras.layers.Layer):\n    def call(self, value):\n        return 3 * value\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    own: Any = importlib.import_module("phosphene_test_objects")
    network = keras.Sequential([K.Input((6, 6, 3)), own.Thrice(name="mine"), K.Conv2D(2, 3)])
    network.save("model.keras")
    monkeypatch.delitem(sys.modules, "phosphene_test_objects")
    with pytest.raises(ModelRefused, match="the custom class Thrice 'mine', and making that runs its author's code"):
        load("model.keras")
    assert "phosphene_test_objects" not in sys.modules
    model = load("model.keras", trust=True)
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image)))
    assert [one.kind for one in model.layers()] == ["Thrice", "Conv2D"]


def test_operations_of_keras_own_are_no_custom_objects(tmp_path: Path) -> None:
    photo = K.Input((8, 8, 3))
    deep = keras.ops.relu(K.Conv2D(2, 3, name="c")(photo) + 1.0)
    network = drawn(keras.Model(photo, K.Dense(2, name="d")(keras.ops.mean(deep, axis=(1, 2)))))
    network.save(tmp_path / "model.keras")
    model = load(tmp_path / "model.keras")
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image), training=False))


def test_networks_that_take_no_picture() -> None:
    with pytest.raises(ModelRefused, match=r"takes \(784,\) numbers and no picture"):
        load(keras.Sequential([K.Input((784,)), K.Dense(2)]))
    one, other = K.Input((8, 8, 3)), K.Input((8, 8, 3))
    with pytest.raises(ModelRefused, match="has 2 inputs"):
        load(keras.Model([one, other], K.Add()([one, other])))
    with pytest.raises(ModelRefused, match="no values yet"):
        load(keras.Sequential([K.Conv2D(2, 3)]))


def test_inputs_in_a_list_or_by_name() -> None:
    for wrap in (lambda one: [one], lambda one: {"photo": one}):
        photo = K.Input((8, 8, 3), name="photo")
        network = drawn(keras.Model(wrap(photo), K.Conv2D(2, 3, name="c")(photo)))
        model = load(network)
        image = image_of(model)
        assert torch.equal(model.forward(image), network(wrap(nhwc(image)), training=False))


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
