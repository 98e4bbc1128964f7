"""Configs of Keras 2, upgraded: by hand, and in files of old versions, which answer as they did there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phosphene.network.loading import load
from phosphene.network.loading.keras2_config import upgrade_config

DATA = Path(__file__).parents[2] / "data/keras"
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
    with model.reading([layer.path for layer in model.layers()]) as read:
        assert len(read(image)) == len(model.layers())


def test_every_old_file_has_an_answer() -> None:
    assert {path.name for path in DATA.iterdir()} - {"README.md"} == set(ANSWERS)


def test_the_same_network_has_the_same_fingerprint_from_every_file() -> None:
    fingerprints = {load(DATA / name).fingerprint for name in ANSWERS if "plain" in name}
    assert len(fingerprints) == 1


def test_upgrading_says_what_keras_2_left_unsaid() -> None:
    old = {
        "class_name": "Sequential",
        "config": [
            {"class_name": "Conv2D", "config": {"name": "c", "batch_input_shape": [None, 8, 8, 3], "dtype": "float32"}},
            {"class_name": "SeparableConv2D", "config": {"name": "s", "groups": 1, "kernel_initializer": None}},
            {"class_name": "LeakyReLU", "config": {"name": "l", "alpha": {"type": "ndarray", "value": 0.25}}},
            {"class_name": "BatchNormalization", "config": {"name": "b", "axis": [3]}},
        ],
    }
    before = json.dumps(old)
    assert upgrade_config(old) == {
        "class_name": "Sequential",
        "config": {
            "name": "sequential",
            "layers": [
                {"class_name": "InputLayer", "config": {"name": "c_input", "batch_shape": [None, 8, 8, 3]}},
                {"class_name": "Conv2D", "config": {"name": "c", "dtype": "float32"}},
                {"class_name": "SeparableConv2D", "config": {"name": "s"}},
                {"class_name": "LeakyReLU", "config": {"name": "l", "alpha": 0.25}},
                {"class_name": "BatchNormalization", "config": {"name": "b", "axis": 3}},
            ],
        },
    }
    assert json.dumps(old) == before
    assert upgrade_config(upgrade_config(old)) == upgrade_config(old)


def test_upgrading_counts_calls_of_inner_networks_from_zero() -> None:
    inner: dict[str, Any] = {
        "name": "base",
        "class_name": "Model",
        "inbound_nodes": [[["photo", 0, 0, {}]], [["photo", 0, 0, {}]]],
    }
    inner["config"] = {"name": "base", "layers": [], "input_layers": [["i", 0, 0]], "output_layers": [["o", 0, 0]]}
    add: dict[str, Any] = {"name": "add", "class_name": "Add", "config": {}}
    add["inbound_nodes"] = [[["base", 1, 0, {}], ["base", 2, 0, {}]]]
    whole = {
        "name": "net",
        "layers": [inner, add],
        "input_layers": [["photo", 0, 0]],
        "output_layers": [["base", 2, 0]],
    }
    new = upgrade_config({"class_name": "Model", "config": whole})["config"]
    assert new["layers"][1]["inbound_nodes"] == [[["base", 0, 0, {}], ["base", 1, 0, {}]]]
    assert new["output_layers"] == ["base", 2, 0]  # from which Keras 3 itself subtracts 1
    assert new["layers"][0]["config"]["input_layers"] == ["i", 0, 0]


@pytest.mark.parametrize(
    ("function", "number", "scale", "offset"),
    [
        ("math.truediv", 127.5, 1 / 127.5, 0.0),
        ("math.multiply", 0.5, 0.5, 0.0),
        ("math.subtract", 1, 1.0, -1),
        ("__operators__.add", 2.0, 1.0, 2.0),
    ],
)
def test_upgrading_turns_arithmetic_on_the_input_into_rescaling(
    function: str, number: float, scale: float, offset: float
) -> None:
    old = {
        "class_name": "TFOpLambda",
        "name": "op",
        "config": {"name": "op", "function": function, "dtype": "float32"},
        "inbound_nodes": [["photo", 0, 0, {"y": number, "name": None}]],
    }
    new = upgrade_config(old)
    assert new["class_name"] == "Rescaling"
    assert new["config"] == {"name": "op", "scale": scale, "offset": offset}
    assert new["inbound_nodes"] == [[["photo", 0, 0, {}]]]
    resize = {**old, "config": {"name": "op", "function": "image.resize"}}
    assert upgrade_config(resize)["class_name"] == "TFOpLambda"
