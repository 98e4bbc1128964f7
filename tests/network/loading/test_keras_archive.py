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
from phosphene.network.loading.keras_archive import HDF5, ZIP, file_signature, is_saved_model, read_saved

DATA = Path(__file__).parents[2] / "data/keras"
OLD_H5, OLD_KERAS = DATA / "keras-2.15-plain.h5", DATA / "keras-2.15-plain.keras"


def write_zip(path: Path, config: Any, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        for name, content in more.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "signature"),
    [
        (b"PK\x03\x04 and so on", ZIP),
        (b"\x89HDF\r\n\x1a\n", HDF5),
        (b"\0" * 512 + b"\x89HDF\r\n\x1a\n", HDF5),
        (b"\x89PNG\r\n\x1a\n", b""),
        (b"", b""),
    ],
)
def test_file_signature(tmp_path: Path, content: bytes, signature: bytes) -> None:
    (tmp_path / "any").write_bytes(content)
    assert file_signature(tmp_path / "any") == signature
    assert is_saved_model(str(tmp_path / "any")) == bool(signature)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    """A file goes by its first bytes, also where Keras itself would go by its name."""
    fingerprint = load(OLD_H5).fingerprint
    for source, name in ((OLD_H5, "a.keras"), (OLD_KERAS, "b.h5"), (OLD_H5, "c"), (OLD_KERAS, "d.model")):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert load(str(tmp_path / name)).fingerprint == fingerprint


def test_what_is_read() -> None:
    saved = read_saved(OLD_H5)
    assert (saved.zipped, saved.version, saved.is_old) == (False, "2.15.0", True)
    assert [layer["class_name"] for layer in saved.config["config"]["layers"]][:2] == ["InputLayer", "Conv2D"]
    assert read_saved(OLD_KERAS).zipped


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.keras", b"", "is empty"),
        ("text.h5", b"no model at all", "neither a zip archive nor an HDF5 file"),
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
    with zipfile.ZipFile(tmp_path / "readme.keras", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ModelRefused, match=r"without config\.json"):
        load(tmp_path / "readme.keras")
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
            for offset in rng.integers(8, len(content), 40):
                damaged[offset] = int(rng.integers(256))
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
            for _ in range(70):
                file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ModelRefused, match=r"bytes that unpacks to 73,40\d,\d+, which is refused"):
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
    inside = write_zip(
        tmp_path / "shape.keras", {"class_name": "Sequential", "config": {}}, **{"model.weights.h5": path.read_bytes()}
    )
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
        with pytest.raises(ModelRefused, match="has a link at /model_weights/mine"):
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


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "[" * 200_000 + "]" * 200_000)
    with pytest.raises(ModelRefused, match="damaged or cut short"):
        read_saved(path)
