"""Custom objects and code in saved Keras models: named, refused, and imported only from a trusted file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from keras_networks import K, image_of, keras, nhwc, randomised
from phosphene.errors import ModelRefused
from phosphene.network.loading import load
from phosphene.network.loading.keras_custom_objects import custom_objects


def layer(kind: str, config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a config of a network with one layer."""
    inner = {"class_name": kind, "config": {"name": "mine", **(config or {})}, **more}
    return {"class_name": "Sequential", "config": {"name": "net", "layers": [inner]}}


def is_class(name: str, module: str) -> bool:
    return name in ("Conv2D", "Sequential", "Zeros")


def is_function(name: str) -> bool:
    return name in ("relu", "linear")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (layer("Conv2D", {"activation": "relu", "bias_initializer": {"class_name": "Zeros", "config": {}}}), []),
        (layer("Lambda", {"function": ["4wEAAAA=", None, None]}), ["the Lambda layer 'mine'"]),
        (layer("TFSMLayer", {"filepath": "/tmp/evil"}), ["the TFSMLayer layer 'mine'"]),
        (layer("TorchModuleWrapper", {"module": "gASVIQAAAA=="}), ["the TorchModuleWrapper layer 'mine'"]),
        (layer("Mine"), ["the custom class Mine 'mine'"]),
        (layer("Conv2D", module="evil"), ["the custom class Conv2D 'mine'"]),
        (layer("Conv2D", registered_name="Evil>Conv2D"), ["the custom class Conv2D 'mine'"]),
        (layer("Conv2D", module="keras.layers", registered_name=None), []),
        (layer("Conv2D", {"activation": "swoosh"}), ["the custom function 'swoosh'"]),
        (
            layer("Conv2D", {"activation": {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}}),
            ["a lambda function"],
        ),
        (
            layer("Conv2D", {"activation": {"class_name": "function", "config": "system", "module": "os"}}),
            ["the custom function 'system'"],
        ),
        (
            layer("Conv2D", {"activation": {"class_name": "function", "config": "relu", "module": "os"}}),
            ["the custom function 'relu'"],
        ),
        (
            layer("Conv2D", {"activation": {"class_name": "function", "config": "relu", "module": "builtins"}}),
            [],
        ),
        (
            layer("Conv2D", {"kernel_regularizer": {"a": [{"class_name": "Deep", "config": {}}]}}),
            ["the custom class Deep"],
        ),
    ],
)  # fmt: skip
def test_what_a_config_needs_beside_keras(config: dict[str, Any], expected: list[str]) -> None:
    before = json.dumps(config)
    assert custom_objects(config, is_class, is_function) == expected
    assert json.dumps(config) == before


def leave_a_mark(value: Any) -> Any:
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
    class Twice(K.Layer):  # type: ignore[misc]
        def call(self, value: Any) -> Any:
            return 2 * value

    network = keras.Sequential([K.Input((6, 6, 3)), Twice(name="mine"), K.Conv2D(2, 3, activation=leave_a_mark)])
    for ending in ("keras", "h5"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PHOSPHENE_TEST_MARK", str(tmp_path / "proof"))
            network.save(tmp_path / f"model.{ending}")
        with pytest.raises(ModelRefused, match=r"the custom class Twice 'mine', the custom function 'leave_a_mark'"):
            load(tmp_path / f"model.{ending}")
        with pytest.raises(ModelRefused, match=r"cannot load .*it needs the custom class Twice.* give the object"):
            load(tmp_path / f"model.{ending}", trust=True)


def test_custom_objects_of_a_trusted_file_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "phosphene_test_objects.py").write_text(
        "import keras\nclass Thrice(keras.layers.Layer):\n    def call(self, value):\n        return 3 * value\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    objects: Any = importlib.import_module("phosphene_test_objects")
    network = keras.Sequential([K.Input((6, 6, 3)), objects.Thrice(name="mine"), K.Conv2D(2, 3)])
    network.save("model.keras")
    monkeypatch.delitem(sys.modules, "phosphene_test_objects")
    with pytest.raises(ModelRefused, match="the custom class Thrice 'mine', and building that runs its author's code"):
        load("model.keras")
    assert "phosphene_test_objects" not in sys.modules
    model = load("model.keras", trust=True)
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image)))
    assert [layer.kind for layer in model.layers()] == ["Thrice", "Conv2D"]


def test_operations_of_keras_own_are_no_custom_objects(tmp_path: Path) -> None:
    photo = K.Input((8, 8, 3))
    deep = keras.ops.relu(K.Conv2D(2, 3, name="c")(photo) + 1.0)
    network = randomised(keras.Model(photo, K.Dense(2, name="d")(keras.ops.mean(deep, axis=(1, 2)))))
    network.save(tmp_path / "model.keras")
    model = load(tmp_path / "model.keras")
    image = image_of(model)
    assert torch.equal(model.forward(image), network(nhwc(image), training=False))
