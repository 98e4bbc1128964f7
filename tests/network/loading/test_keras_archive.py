"""Saved Keras models by first bytes, and what is refused of them before Keras sees it."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from phosphene import load
from phosphene.errors import ModelNotFound, ModelRefused
from phosphene.network.loading.keras2_config import upgrade_config
from phosphene.network.loading.keras_archive import HDF5, ZIP, file_signature, is_saved_model, read_saved
from phosphene.network.loading.keras_custom_objects import custom_objects

DATA = Path(__file__).parents[2] / "data/keras"
OLD_H5, OLD_KERAS = DATA / "keras-2.15-plain.h5", DATA / "keras-2.15-plain.keras"


def write_zip(path: Path, config: Any, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        for name, content in more.items():
            archive.writestr(name, content)
    return path


def layer(kind: str, config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a config of a network with one layer."""
    inner = {"class_name": kind, "config": {"name": "mine", **(config or {})}, **more}
    return {"class_name": "Sequential", "config": {"name": "net", "layers": [inner]}}


@pytest.mark.parametrize(
    ("content", "mark"),
    [
        (b"PK\x03\x04 and so on", ZIP),
        (b"\x89HDF\r\n\x1a\n", HDF5),
        (b"\0" * 512 + b"\x89HDF\r\n\x1a\n", HDF5),
        (b"\x89PNG\r\n\x1a\n", b""),
        (b"", b""),
    ],
)
def test_file_signature(tmp_path: Path, content: bytes, mark: bytes) -> None:
    (tmp_path / "any").write_bytes(content)
    assert file_signature(tmp_path / "any") == mark
    assert is_saved_model(str(tmp_path / "any")) == bool(mark)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    """A file goes by its first bytes, also where Keras itself would go by its name."""
    fingerprint = load(OLD_H5).fingerprint
    for source, name in ((OLD_H5, "a.keras"), (OLD_KERAS, "b.h5"), (OLD_H5, "c"), (OLD_KERAS, "d.model")):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert load(str(tmp_path / name)).fingerprint == fingerprint


def test_what_is_read() -> None:
    saved = read_saved(OLD_H5)
    assert (saved.zipped, saved.version, saved.is_old) == (False, "2.15.0", True)
    assert [one["class_name"] for one in saved.config["config"]["layers"]][:2] == ["InputLayer", "Conv2D"]
    assert read_saved(OLD_KERAS).zipped


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.keras", b"", "is empty"),
        ("text.h5", b"no model at all", "begins neither as a zip archive nor as HDF5"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelRefused, match=text):
        load(tmp_path / name)


def test_missing_files_folders_and_other_archives(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="there is no file"):
        load(tmp_path / "none.keras")
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(ModelRefused, match="is a folder"):
        load(tmp_path / "folder.keras")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ModelRefused, match=r"without config\.json"):
        load(tmp_path / "other.keras")
    write_zip(tmp_path / "list.keras", [1, 2])
    with pytest.raises(ModelRefused, match="no class_name"):
        load(tmp_path / "list.keras")


@pytest.mark.parametrize("path", [OLD_H5, OLD_KERAS], ids=["h5", "keras"])
def test_a_file_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    cut = tmp_path / path.name
    for share in range(1, 20):
        cut.write_bytes(content[: len(content) * share // 20])
        with pytest.raises(ModelRefused, match="damaged or cut short"):
            read_saved(cut)


def test_a_damaged_file_is_refused_or_read_but_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for path in (OLD_H5, OLD_KERAS):
        content = bytearray(path.read_bytes())
        for _ in range(30):
            damaged = bytearray(content)
            for place in rng.integers(8, len(content), 40):
                damaged[place] = int(rng.integers(256))
            (tmp_path / path.name).write_bytes(damaged)
            try:
                read_saved(tmp_path / path.name)
            except ModelRefused as error:
                assert str(tmp_path / path.name) in str(error)  # noqa: PT017


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        with archive.open("model.weights.h5", "w") as file:
            for _ in range(300):
                file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ModelRefused, match=r"bytes that unpacks to 314,57\d,\d+, which is refused"):
        read_saved(path)
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


def test_a_config_of_absurd_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("noise", os.urandom(2**20))
        with archive.open("config.json", "w") as file:
            for _ in range(70):
                file.write(b" " * 2**20)
    with pytest.raises(ModelRefused, match="which is refused"):
        read_saved(path)


def test_datasets_that_claim_more_than_they_store_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shape.h5"
    path.write_bytes(OLD_H5.read_bytes())
    with h5py.File(path, "r+") as file:
        file.create_dataset("model_weights/huge", (10**6, 10**6), "f4", chunks=(100, 100))
    with pytest.raises(ModelRefused, match=r"unpacks to 4,000,000,\d+,\d+"):
        read_saved(path)
    inside = write_zip(tmp_path / "shape.keras", layer("Flatten"), **{"model.weights.h5": path.read_bytes()})
    with pytest.raises(ModelRefused, match="which is refused"):
        read_saved(inside)


def test_links_to_other_files_are_refused(tmp_path: Path) -> None:
    for name, link in (
        ("external", h5py.ExternalLink("/etc/secret.h5", "/")),
        ("soft", h5py.SoftLink("/model_weights")),
    ):
        path = tmp_path / f"{name}.h5"
        path.write_bytes(OLD_H5.read_bytes())
        with h5py.File(path, "r+") as file:
            file["model_weights/mine"] = link
        with pytest.raises(ModelRefused, match="points elsewhere at /model_weights/mine"):
            read_saved(path)
    path = tmp_path / "storage.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("mine", (4,), "u1", external=[("/etc/hostname", 0, 4)])
    with pytest.raises(ModelRefused, match="keeps /mine in another file"):
        read_saved(path)


def test_groups_that_hold_themselves_end(tmp_path: Path) -> None:
    path = tmp_path / "circle.h5"
    path.write_bytes(OLD_H5.read_bytes())
    with h5py.File(path, "r+") as file:
        file["model_weights/again"] = file["/"]
    assert read_saved(path).version == "2.15.0"


def test_weights_alone_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["conv/kernel"] = np.zeros((3, 3, 1, 2))
    with pytest.raises(ModelRefused, match=r"weights only and no config .*; save the whole model with model.save"):
        load(tmp_path / "weights.h5")


def known_class(name: str, module: str) -> bool:
    return name in ("Conv2D", "Sequential", "Zeros")


def known_function(name: str) -> bool:
    return name in ("relu", "linear")


@pytest.mark.parametrize(
    ("config", "found"),
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
def test_what_a_config_needs_beside_keras(config: dict[str, Any], found: list[str]) -> None:
    before = json.dumps(config)
    assert custom_objects(config, known_class, known_function) == found
    assert json.dumps(config) == before


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "[" * 200_000 + "]" * 200_000)
    with pytest.raises(ModelRefused, match="damaged or cut short"):
        read_saved(path)


def test_mending_says_what_keras_2_left_unsaid() -> None:
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


def test_mending_counts_calls_of_inner_networks_from_zero() -> None:
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
    assert new["output_layers"] == ["base", 2, 0]  # from which Keras 3 takes the one itself
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
def test_mending_turns_arithmetic_on_the_input_into_rescaling(
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
    other = {**old, "config": {"name": "op", "function": "image.resize"}}
    assert upgrade_config(other)["class_name"] == "TFOpLambda"
