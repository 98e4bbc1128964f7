"""Saved Keras models: what a file is by its first bytes, whether it is safe to read, and the config inside.

Nothing in a file is run here, and nothing is unpacked before its size is known.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phosphene.errors import ExtraMissing, ModelNotFound, ModelRefused, first_line, require_extra

SUFFIXES = (".keras", ".h5", ".hdf5")
ZIP, HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
LONGEST_CONFIG = 64 * 2**20
# a sound file of weights hardly shrinks when it is packed
MOST_EXPANSION, BOMB_FLOOR = 100, 64 * 2**20

# what these do when they are made from their config is whatever the file says
RUNS_CODE = {"Lambda", "__lambda__", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
# how plain Python values are written down
VALUES = {"__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__tuple__"}
VALUES |= {"__typespec__", "TensorShape"}
NOT_READ = ("compile_config", "build_config", "training_config")  # of training, which is not taken up again


@dataclass(frozen=True)
class Saved:
    """A saved Keras model.

    Attributes:
        path: the file.
        zipped: whether it is a zip archive, as `.keras` files are; otherwise it is HDF5.
        config: the network as JSON values.
        version: of the Keras that wrote it, "" where the file does not say.
    """

    path: Path
    zipped: bool
    config: dict[str, Any]
    version: str

    @property
    def is_old(self) -> bool:
        """Whether it was written before Keras 3."""
        return self.version.split(".")[0] in ("1", "2") or self.version == ""


def first_bytes(path: Path) -> bytes:
    """Return the mark that a file begins with, ZIP or HDF5; b"" for any other."""
    with path.open("rb") as file:
        start = file.read(2049)
    if start.startswith(ZIP):
        return ZIP
    # HDF5 allows a block of the user's own before its mark
    return HDF5 if any(start[offset:].startswith(HDF5) for offset in (0, 512, 1024)) else b""


def is_saved_model(reference: str) -> bool:
    """Return whether a model reference is meant as a saved Keras model: by its ending, or by its first bytes."""
    path = Path(reference)
    if path.suffix.lower() in SUFFIXES or (path / "saved_model.pb").is_file():
        return True
    return path.is_file() and path.suffix.lower() not in (".pt", ".pth") and first_bytes(path) != b""


def read_saved(path: Path) -> Saved:
    """Return what a file says of the network in it, once it is known to be safe to read.

    Raises:
        ModelNotFound: there is no such file.
        ModelRefused: it is no saved Keras model, damaged, cut short, without a config, or unpacks to far too much.
    """
    if path.is_dir():
        raise ModelRefused(f"{path} is a folder; save the model as one file: model.save('model.keras')")
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ModelRefused(f"{path} is empty (0 bytes)")
    mark = first_bytes(path)
    if not mark:
        raise ModelRefused(f"{path} is no saved Keras model, for it begins neither as a zip archive nor as HDF5")
    try:
        return read_zip(path) if mark == ZIP else read_hdf5(path)
    except (ModelRefused, ExtraMissing):
        raise
    except Exception as error:  # what a damaged file raises is anything at all
        raise ModelRefused(
            f"{path} is damaged or cut short ({type(error).__name__}: {first_line(error)}); save or copy it again"
        ) from error


def read_zip(path: Path) -> Saved:
    """Return what a `.keras` archive holds."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        check_archive(path, archive)
        if CONFIG not in names:
            raise ModelRefused(f"{path} is a zip archive without {CONFIG}, so no saved Keras model")
        config = json.loads(archive.read(CONFIG))
        metadata = json.loads(archive.read(METADATA)) if METADATA in names else {}
        if WEIGHTS in names:
            with archive.open(WEIGHTS) as file:
                check_datasets(path, file)
    return Saved(path, True, network_config(path, config), str(metadata.get("keras_version", "")))


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that would unpack to far more than it holds, and a config of absurd length."""
    unpacked = sum(one.file_size for one in archive.infolist())
    if unpacked > BOMB_FLOOR and unpacked > MOST_EXPANSION * path.stat().st_size:
        raise too_large(path, unpacked)
    for one in archive.infolist():
        if one.filename in (CONFIG, METADATA) and one.file_size > LONGEST_CONFIG:
            raise too_large(path, one.file_size)


def too_large(path: Path, unpacked: int) -> ModelRefused:
    return ModelRefused(
        f"{path} is a file of {path.stat().st_size:,} bytes that unpacks to {unpacked:,}, which is refused"
    )


def read_hdf5(path: Path) -> Saved:
    """Return what an `.h5` or `.hdf5` file holds."""
    check_datasets(path, path)
    with require_extra("h5py", "keras").File(path, "r") as file:
        config, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "")
        if config is None:
            raise ModelRefused(
                f"{path} holds weights only and no config of the network; save the whole model with model.save(…), "
                "or make the network, load these weights into it, and give the object"
            )
    return Saved(path, False, network_config(path, json.loads(config)), text(version))


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def network_config(path: Path, config: Any) -> dict[str, Any]:
    """Return the config if it is one of a network."""
    if not isinstance(config, dict) or not {"class_name", "config"} <= set(config):
        raise ModelRefused(f"{path} holds no network that Keras can make: its config has no class_name")
    return config


def check_datasets(path: Path, file: Any) -> None:
    """Refuse HDF5 of which reading would fill the memory, or open other files.

    Datasets may claim any shape and store nothing; and links and external storage name files of the reader's machine.
    """
    h5py = require_extra("h5py", "keras")
    claimed = 0
    with h5py.File(file, "r") as opened:
        for name, link in links(h5py, opened):
            if not isinstance(link, h5py.HardLink):
                raise ModelRefused(f"{path} points elsewhere at {name} ({type(link).__name__}), which is refused")
            one = opened[name]
            if isinstance(one, h5py.Dataset):
                if one.external or one.is_virtual:
                    raise ModelRefused(f"{path} keeps {name} in another file, which is refused")
                claimed += math.prod(one.shape or ()) * one.dtype.itemsize
    if claimed > BOMB_FLOOR and claimed > MOST_EXPANSION * path.stat().st_size:
        raise too_large(path, claimed)


def links(h5py: Any, group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and link of everything in a group, following nothing but hard links; no group twice."""
    todo, seen = [(above, group)], set()
    while todo:
        prefix, here = todo.pop()
        for name in here:
            link = here.get(name, getlink=True)
            yield f"{prefix}/{name}", link
            one = here[name] if isinstance(link, h5py.HardLink) else None
            if isinstance(one, h5py.Group) and (place := h5py.h5o.get_info(one.id).addr) not in seen:
                seen.add(place)
                todo.append((f"{prefix}/{name}", one))


def entries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict in JSON values that says how to make something, outermost first."""
    todo = [config]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            if isinstance(one.get("class_name"), str):
                yield one
            todo += [value for key, value in reversed(one.items()) if key not in NOT_READ]
        elif isinstance(one, list):
            todo += reversed(one)


def strangers(
    config: dict[str, Any], is_class: Callable[[str, str], bool], is_function: Callable[[str], bool]
) -> list[str]:
    """Return in words what a config needs beside Keras' own parts: custom objects, and what runs code from the file.

    Args:
        config: the network as JSON values; nothing in it is made.
        is_class: whether Keras has a class of that name, and module, to build networks from.
        is_function: whether Keras has an activation function, or other plain function, of that name.
    """
    found = (stranger(one, is_class, is_function) for one in entries(config))
    return list(dict.fromkeys(one for one in found if one))


def stranger(one: dict[str, Any], is_class: Callable[[str, str], bool], is_function: Callable[[str], bool]) -> str:
    """Return what an entry of a config needs beside Keras' own parts, "" where nothing."""
    kind, inner, module = one["class_name"], one.get("config"), one.get("module")
    name = inner.get("name") if isinstance(inner, dict) else None
    called = f" {name!r}" if isinstance(name, str) else ""
    if kind in RUNS_CODE:
        return f"the {kind} layer{called}" if kind != "__lambda__" else "a lambda function"
    if kind in VALUES:
        return ""
    if kind == "function":
        known = isinstance(inner, str) and is_function(inner)
        return "" if known and is_keras(module) else f"the custom function {inner!r}"
    package = str(one.get("registered_name") or "").rpartition(">")[0]
    if not is_class(kind, str(module)) or not is_keras(module) or package not in ("", "Keras", "keras"):
        return f"the custom class {kind}{called}"
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if key.endswith("activation") and isinstance(value, str) and not is_function(value):
            return f"the custom function {value!r}"
    return ""


def is_keras(module: Any) -> bool:
    """Return whether a config's module is Keras' own, or left out as old files do."""
    return module is None or str(module).split(".")[0] in ("keras", "tf_keras", "builtins")
