"""Saved Keras models: the format by the first bytes, whether a file is safe to read, and the config inside.

Nothing in a file is run here, and nothing is unpacked before its size is known.
"""

import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phosphene.errors import ExtraMissing, ModelNotFound, ModelRefused, first_line, require_extra

SUFFIXES = (".keras", ".h5", ".hdf5")
ZIP, HDF5 = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
LONGEST_CONFIG = 64 * 2**20
# weights hardly shrink when they are compressed, so that a larger factor means a file made to fill the memory
MOST_EXPANSION, BOMB_FLOOR = 100, 64 * 2**20


@dataclass(frozen=True)
class SavedModel:
    """A saved Keras model.

    Attributes:
        path: the file.
        zipped: whether it is a zip archive, as `.keras` files are; otherwise it is HDF5.
        config: the network as JSON values.
        version: the version of Keras that wrote it, "" if the file does not say.
    """

    path: Path
    zipped: bool
    config: dict[str, Any]
    version: str

    @property
    def is_old(self) -> bool:
        """Whether it was written before Keras 3."""
        return self.version.split(".")[0] in ("1", "2") or self.version == ""


def file_signature(path: Path) -> bytes:
    """Return the signature that a file begins with, ZIP or HDF5; b"" for any other."""
    with path.open("rb") as file:
        start = file.read(2049)
    if start.startswith(ZIP):
        return ZIP
    # HDF5 allows a user block before its signature
    return HDF5 if any(start[offset:].startswith(HDF5) for offset in (0, 512, 1024)) else b""


def is_saved_model(reference: str) -> bool:
    """Return whether a reference means a saved Keras model: by its suffix, or by the first bytes of the file."""
    path = Path(reference)
    if path.suffix.lower() in SUFFIXES or (path / "saved_model.pb").is_file():
        return True
    return path.is_file() and path.suffix.lower() not in (".pt", ".pth") and file_signature(path) != b""


def read_saved(path: Path) -> SavedModel:
    """Return the network's config from a file, after checks that the file is safe to read.

    Raises:
        ModelNotFound: there is no such file.
        ModelRefused: it is not a saved Keras model, is damaged or cut short, has no config, or unpacks to far too much.
    """
    if path.is_dir():
        raise ModelRefused(f"{path} is a folder; save the model as one file: model.save('model.keras')")
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise ModelRefused(f"{path} is empty (0 bytes)")
    signature = file_signature(path)
    if not signature:
        raise ModelRefused(f"{path} is no saved Keras model: it is neither a zip archive nor an HDF5 file")
    try:
        return read_zip(path) if signature == ZIP else read_hdf5(path)
    except (ModelRefused, ExtraMissing):
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ModelRefused(
            f"{path} is damaged or cut short ({type(error).__name__}: {first_line(error)}); save or copy it again"
        ) from error


def read_zip(path: Path) -> SavedModel:
    """Return the content of a `.keras` archive."""
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
    return SavedModel(path, True, network_config(path, config), str(metadata.get("keras_version", "")))


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that unpacks to far more than its own size, or has a config of absurd length."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > BOMB_FLOOR and unpacked > MOST_EXPANSION * path.stat().st_size:
        raise too_large(path, unpacked)
    for entry in archive.infolist():
        if entry.filename in (CONFIG, METADATA) and entry.file_size > LONGEST_CONFIG:
            raise too_large(path, entry.file_size)


def too_large(path: Path, unpacked: int) -> ModelRefused:
    return ModelRefused(
        f"{path} is a file of {path.stat().st_size:,} bytes that unpacks to {unpacked:,}, which is refused"
    )


def read_hdf5(path: Path) -> SavedModel:
    """Return the content of an `.h5` or `.hdf5` file."""
    check_datasets(path, path)
    with require_extra("h5py", "keras").File(path, "r") as file:
        config, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "")
        if config is None:
            raise ModelRefused(
                f"{path} holds weights only and no config of the network; save the whole model with model.save(…), "
                "or make the network, load these weights into it, and give the object"
            )
    config = network_config(path, json.loads(config))
    return SavedModel(path, False, config, version.decode() if isinstance(version, bytes) else str(version))


def network_config(path: Path, config: Any) -> dict[str, Any]:
    """Return the config if it describes a network."""
    if not isinstance(config, dict) or not {"class_name", "config"} <= set(config):
        raise ModelRefused(f"{path} holds no network that Keras can make: its config has no class_name")
    return config


def check_datasets(path: Path, file: Any) -> None:
    """Refuse an HDF5 file that would fill the memory when read, or that opens other files.

    A dataset may claim any shape and store nothing; links and external storage may name any file of this machine.
    """
    h5py = require_extra("h5py", "keras")
    claimed = 0
    with h5py.File(file, "r") as opened:
        for name, link in links(h5py, opened):
            if not isinstance(link, h5py.HardLink):
                raise ModelRefused(f"{path} has a link at {name} ({type(link).__name__}), which is refused")
            dataset = opened[name]
            if isinstance(dataset, h5py.Dataset):
                if dataset.external or dataset.is_virtual:
                    raise ModelRefused(f"{path} keeps {name} in another file, which is refused")
                claimed += math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    if claimed > BOMB_FLOOR and claimed > MOST_EXPANSION * path.stat().st_size:
        raise too_large(path, claimed)


def links(h5py: Any, root: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and link of everything below a group, following only hard links, and no group twice."""
    pending, seen = [("", root)], set()
    while pending:
        prefix, group = pending.pop()
        for name in group:
            link = group.get(name, getlink=True)
            yield f"{prefix}/{name}", link
            target = group[name] if isinstance(link, h5py.HardLink) else None
            if isinstance(target, h5py.Group) and (offset := h5py.h5o.get_info(target.id).addr) not in seen:
                seen.add(offset)
                pending.append((f"{prefix}/{name}", target))
