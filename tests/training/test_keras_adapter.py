"""A Keras network for a recorder: nested networks, frozen layers, kinds of kernels, and what cannot be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from phosphene.errors import LayerNotFound, ModelRefused
from phosphene.network.loading import load
from phosphene.training.history import open_history
from phosphene.training.keras_adapter import keras_network
from small_keras import K, KerasRecorder, float64, keras, pictures


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with float64():
        yield


def test_nested_networks_frozen_layers_and_weights_of_one_path(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    photo = K.Input((10, 10, 3))
    inner = keras.Model(photo, K.Conv2D(3, 3, name="deep")(photo), name="inner")
    branches = [K.Conv2D(4, 3, name="twin"), K.DepthwiseConv2D(3, depth_multiplier=2, name="wide")]
    first = keras.Sequential([K.Input((8, 8, 3)), branches[0]], name="a")
    second = keras.Sequential([K.Input((8, 8, 3)), K.Conv2D(2, 3, name="twin"), branches[1]], name="a_")
    start = K.Input((10, 10, 3))
    value = inner(start)
    joined = K.Concatenate(name="both")([K.Flatten(name="f1")(first(value)), K.Flatten(name="f2")(second(value))])
    network = keras.Model(start, K.Dense(17, activation="softmax", name="out")(joined), name="nest")
    network.compile("adam", "categorical_crossentropy")
    inner.trainable = False
    recorder = KerasRecorder(tmp_path / "run")
    network.fit(*pictures(6, 10), batch_size=3, epochs=1, verbose=0, callbacks=[recorder])
    history, model = open_history(tmp_path / "run"), load(network)
    assert history.layers == list(keras_network(network).kernels)
    assert set(history.layers) == {layer.path for layer in model.layers().convolutions}
    assert history.layers == ["inner/deep", "a/twin", "a_/twin", "a_/wide"]
    for path in history.layers:
        expected = model.layout.kernel(model.modules[path])
        assert expected is not None
        assert torch.equal(history.kernels(path).weights, expected.detach())
    assert not any("deep" in name for name in history.weights)
    assert len(set(history.weights)) == len(network.trainable_weights) == 8
    assert list(history.gradients()) == history.weights
    recorder = KerasRecorder(tmp_path / "some", layers="*wide")
    network.fit(*pictures(3, 10), epochs=1, verbose=0, callbacks=[recorder])
    assert open_history(tmp_path / "some").layers == ["a_/wide"]
    with pytest.raises(LayerNotFound, match="inner/deep, a/twin, a_/twin, a_/wide"):
        network.fit(*pictures(3, 10), verbose=0, callbacks=[KerasRecorder(tmp_path / "no", layers="block*")])


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(ModelRefused, match="has no weights yet; build it"):
        keras_network(keras.Sequential([K.Conv2D(2, 3)], name="empty"))
