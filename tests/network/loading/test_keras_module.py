"""Keras networks as modules: the numbers that Keras gives, at every layer, and the network left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import phosphene as ph
from keras_networks import K, image_of, keras, nhwc, randomised, small
from phosphene.errors import LayerNotFound
from phosphene.network.loading import load
from phosphene.network.preprocessing import Preprocessing

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def small_network() -> tuple[Any, ph.Model]:
    network = small()
    return network, load(network)


def test_every_layer_equals_keras_own_submodel(small_network: tuple[Any, ph.Model]) -> None:
    network, model = small_network
    image = image_of(model, 2)
    submodel = keras.Model(network.inputs, [layer.output for layer in network.layers])
    paths = [layer.path for layer in model.layers()]
    assert paths == [layer.name for layer in network.layers]
    for path, expected in zip(paths, submodel(nhwc(image), training=False), strict=True):
        with model.reading([path]) as read:
            act = read(image)[path]
        assert torch.equal(act if act.dim() == 2 else act.permute(0, 2, 3, 1), expected)


def test_gradients_are_right_at_every_layer(small_network: tuple[Any, ph.Model]) -> None:
    """The gradient of a class score at a layer equals that through Keras' own network from there on."""
    network, model = small_network
    image = image_of(model, 2)
    for index, path in enumerate([layer.path for layer in model.layers()][:-2]):
        with model.reading([path, model.logits], roots=[path]) as read:
            acts = read(image)
            (gradient,) = torch.autograd.grad(acts[model.logits][:, 1].sum(), acts[path])
        rest = value = acts[path].detach().permute(0, 2, 3, 1).requires_grad_()
        for layer in network.layers[index + 1 : -1]:
            rest = layer(rest, training=False)
        score = (rest @ network.layers[-1].kernel.value + network.layers[-1].bias.value)[:, 1].sum()
        (expected,) = torch.autograd.grad(score, value)
        assert torch.allclose(gradient.permute(0, 2, 3, 1), expected, atol=1e-6 * float(expected.abs().max()))


def test_before_the_activation_and_after(small_network: tuple[Any, ph.Model]) -> None:
    network, model = small_network
    image = image_of(model)
    paths = ["c1#preactivation", "c1", "c2#preactivation", "c2", "out#preactivation", "out", ""]
    with model.reading(paths) as read, torch.no_grad():
        acts = read(image)
    kernel, bias = (weight.value for weight in network.get_layer("c1").weights)
    by_hand = F.conv2d(image, kernel.permute(3, 2, 0, 1), bias)
    assert torch.allclose(acts["c1#preactivation"], by_hand, atol=1e-6)
    assert (acts["c1#preactivation"] < 0).any()
    assert torch.equal(acts["c1"], acts["c1#preactivation"].relu())
    assert torch.equal(acts["c2"], F.leaky_relu(acts["c2#preactivation"], 0.3))
    assert torch.equal(acts["out"], acts["out#preactivation"].softmax(1))
    assert torch.equal(acts["out"], acts[""])
    assert model.logits == "out#preactivation"


def test_before_the_activation_a_later_tensor_can_be_differentiated(small_network: tuple[Any, ph.Model]) -> None:
    model = small_network[1]
    image = image_of(model)
    with model.reading(["c1#preactivation", "c1"], roots=["c1#preactivation"]) as read:
        acts = read(image)
        (gradient,) = torch.autograd.grad(acts["c1"].sum(), acts["c1#preactivation"])
    assert torch.equal(gradient, (acts["c1#preactivation"] > 0).float())


def test_the_table_shows_fused_activations(small_network: tuple[Any, ph.Model]) -> None:
    table = small_network[1].layers()
    assert [(layer.path, layer.kind) for layer in table] == [
        ("c1", "Conv2D + relu"),
        ("b1", "BatchNormalization"),
        ("c2", "Conv2D + LeakyReLU"),
        ("d", "Dropout"),
        ("dw", "DepthwiseConv2D"),
        ("act", "Activation"),
        ("f", "Flatten"),
        ("out", "Dense + softmax"),
    ]
    assert [layer.path for layer in table.convolutions] == ["c1", "c2", "dw"]
    assert table.find("c1#preactivation").kind == "Conv2D"
    assert table.find("c1#preactivation").size == (10, 10)
    assert [layer.path for layer in table.matching("c*#pre*")] == ["c1#preactivation", "c2#preactivation"]
    assert [layer.path for layer in table.matching("c*")] == ["c1", "c2"]
    with pytest.raises(LayerNotFound, match="the nearest are: c1#preactivation"):
        table.find("c1#preactivatoin")


def test_nothing_is_left_behind(untouched: Untouched) -> None:
    network = small()
    network.get_layer("b1").trainable = False
    model = load(network)
    activations = [vars(layer).get("activation", "none") for layer in network.layers]
    values = [variable.numpy().copy() for variable in network.variables]
    trainable = [variable.trainable for variable in network.variables]
    draws = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with untouched(model.module):
        model.layers()
        ph.render(model, ph.channel("c2#preactivation", [0]), "fast", steps=2, size=12)
        ph.render(model, ph.logit([0], model.logits), "fast", steps=2, size=12)
        reading = model.reading(["c1#preactivation", "out#preactivation"])
        with pytest.raises(ZeroDivisionError), reading as read:
            read(image_of(model))[1 // 0]
    assert [vars(layer).get("activation", "none") for layer in network.layers] == activations
    assert network.get_layer("c2").activation.name.startswith("leaky")
    for variable, before in zip(network.variables, values, strict=True):
        assert np.array_equal(variable.numpy(), before)
        assert variable.value.requires_grad == variable.trainable
    assert [variable.trainable for variable in network.variables] == trainable
    assert random.getstate() == draws[0]
    assert np.array_equal(np.random.get_state()[1], draws[1])  # type: ignore[index]
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in network.layers)


def test_what_a_layer_draws_or_adds_in_a_forward_pass_is_taken_back() -> None:
    class Noisy(K.Layer):  # type: ignore[misc]
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
        assert not any(variable.value.requires_grad for variable in network.variables)
        assert not any(layer.training for layer in network.layers)
        assert not read(image_of(model))["out"].requires_grad
    assert network.layers[0].kernel.value.requires_grad


def test_nested_networks_are_addressed_through_their_holder() -> None:
    photo = K.Input((10, 10, 3))
    inner = keras.Model(photo, K.Conv2D(3, 3, name="deep", activation="relu")(photo), name="inner")
    base_in = K.Input((10, 10, 3))
    base = keras.Model(base_in, K.Conv2D(2, 3, name="late")(inner(base_in)), name="base")
    ends = [K.GlobalAveragePooling2D(name="pool"), K.Dense(2, name="out")]
    network = randomised(keras.Sequential([K.Input((10, 10, 3)), base, *ends]))
    model = load(network)
    paths = [layer.path for layer in model.layers()]
    assert paths == ["base/inner/deep", "base/inner", "base/late", "base", "pool", "out"]
    image = image_of(model)
    with model.reading(["base/inner/deep", "base/inner"]) as read:
        acts = read(image)
    assert torch.equal(nhwc(acts["base/inner/deep"]), inner(nhwc(image), training=False))
    assert torch.equal(acts["base/inner"], acts["base/inner/deep"])
    holders = ("base/inner/deep", "base/late", "out")
    assert set(model.module.state_dict()) == {f"{holder}/{name}" for holder in holders for name in ("kernel", "bias")}


def test_a_layer_that_runs_twice_has_an_address_for_each_call() -> None:
    photo = K.Input((9, 9, 2))
    shared = K.Conv2D(2, 3, padding="same", activation="relu", name="shared")
    network = randomised(keras.Model(photo, shared(shared(photo))))
    model = load(network)
    assert [layer.path for layer in model.layers()] == ["shared@0", "shared@1"]
    with model.reading(["shared@0", "shared@1#preactivation", "shared@1"]) as read:
        acts = read(image_of(model))
    assert torch.equal(acts["shared@1"], acts["shared@1#preactivation"].relu())
    kernel, bias = (weight.value for weight in shared.weights)
    by_hand = F.conv2d(acts["shared@0"], kernel.permute(3, 2, 0, 1), bias, padding=1)
    assert torch.allclose(acts["shared@1#preactivation"], by_hand, atol=1e-6)


def test_kernels_are_those_that_reproduce_the_layer() -> None:
    layers = [
        K.Conv2D(4, (3, 2), use_bias=False, name="plain"),
        K.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise"),
        K.SeparableConv2D(5, 3, depth_multiplier=2, use_bias=False, name="separable"),
        K.Conv2DTranspose(3, 3, use_bias=False, name="transposed"),
        K.Conv2D(4, 1, groups=1, activation="relu", use_bias=False, name="pointwise"),
        K.Flatten(),
        K.Dense(2),
    ]
    network = randomised(keras.Sequential([K.Input((14, 14, 3)), *layers]))
    model = load(network)
    names = ["plain", "depthwise", "separable", "transposed", "pointwise#preactivation"]
    with model.reading(names) as read, torch.no_grad():
        acts = read(image_of(model))
    kernels = {name: model.layout.kernel(model.modules[name]) for name in names}
    assert [tuple(kernel.shape) for kernel in kernels.values() if kernel is not None] == [
        (4, 3, 3, 2), (8, 1, 3, 3), (5, 8, 3, 3), (3, 5, 3, 3), (4, 3, 1, 1),
    ]  # fmt: skip
    inputs: Tensor = image_of(model)
    for name in names:
        kernel = kernels[name]
        assert kernel is not None
        kernel = kernel.detach()
        if name == "transposed":
            outputs = F.conv_transpose2d(inputs, kernel.transpose(0, 1))
        else:
            outputs = F.conv2d(inputs, kernel, groups=inputs.shape[1] if name == "depthwise" else 1)
        assert torch.allclose(outputs, acts[name], atol=1e-5 * outputs.abs().max().item())
        inputs = acts[name]
    assert model.layout.kernel(model.modules["dense"] if "dense" in model.modules else network.layers[-1]) is None


def test_channels_first_networks_give_the_same_maps() -> None:
    def network(data_format: str) -> Any:
        shape = (3, 9, 9) if data_format == "channels_first" else (9, 9, 3)
        options = {"data_format": data_format}
        layers = [K.Conv2D(4, 3, activation="relu", name="a", **options), K.MaxPooling2D(2, name="b", **options)]
        return randomised(keras.Sequential([K.Input(shape), *layers, K.Conv2D(2, 2, name="c", **options)]))

    first, last = (load(network(data_format)) for data_format in ("channels_first", "channels_last"))
    assert (first.input_size, first.channels_in) == (last.input_size, last.channels_in) == ((9, 9), 3)
    image = image_of(first)
    for path in ("a", "b", "c"):
        with first.reading([path]) as read_first, last.reading([path]) as read_last:
            assert torch.allclose(read_first(image)[path], read_last(image)[path], atol=1e-6)
        assert first.find(path).receptive_field == last.find(path).receptive_field
    kernels = [model.layout.kernel(model.modules["a"]) for model in (first, last)]
    assert kernels[0] is not None
    assert kernels[1] is not None
    assert torch.equal(kernels[0], kernels[1])


def test_dead_filters_are_flagged_and_live_again_before_the_activation() -> None:
    network = randomised(keras.Sequential([K.Input((16, 16, 3)), K.Conv2D(2, 3, activation="relu", name="c")]))
    kernel, bias = network.layers[0].get_weights()
    bias[1] = -1000
    network.layers[0].set_weights([kernel, bias])
    model = load(network)
    dead = ph.render(model, ph.channel("c", [0, 1]), "fast", steps=3, size=16).dead
    assert dead.tolist() == [False, True]
    before = ph.render(model, ph.channel("c#preactivation", [1]), "fast", steps=8, size=16)
    assert before.dead.tolist() == [False]
    assert (before.scores > before.start_scores).all()


def test_inputs_in_a_list_or_by_name() -> None:
    for wrap in (lambda tensor: [tensor], lambda tensor: {"photo": tensor}):
        photo = K.Input((8, 8, 3), name="photo")
        network = randomised(keras.Model(wrap(photo), K.Conv2D(2, 3, name="c")(photo)))
        model = load(network)
        image = image_of(model)
        assert torch.equal(model.forward(image), network(wrap(nhwc(image)), training=False))


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
