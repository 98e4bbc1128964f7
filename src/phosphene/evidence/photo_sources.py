"""Where many photos lie: files of a folder, rows of Parquet files, or a dataset of the user's own."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from phosphene.errors import InvalidRequest, PhotoRefused, require_extra
from phosphene.images.photo import SUFFIXES

KEYS = ("image", "img")  # under which a dataset's row holds its photo
SAMPLES = 3  # photos of a dataset by which it is known again


def threads_here() -> int:
    """Return how many photos are read at once."""
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """Files of photos, in the order of their names."""

    paths: tuple[Path, ...]
    kind = "files"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def threads(self) -> int:
        return threads_here()

    def item(self, index: int) -> Path:
        return self.paths[index]

    def name(self, index: int) -> str:
        return self.paths[index].name

    def digest(self) -> str:
        listed = ((path.name, path.stat().st_size if path.exists() else -1) for path in self.paths)
        return short_digest(f"{name}\0{size}\0".encode() for name, size in listed)


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """Rows of a column of Parquet files, in the order of their names.

    Attributes:
        groups: of each row group its file, its number in it, and its rows.
    """

    paths: tuple[Path, ...]
    column: str
    groups: tuple[tuple[Path, int, int], ...]
    state: ProcessLocal = field(default_factory=lambda: ProcessLocal(), repr=False)
    kind = "parquet"

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.groups)

    @property
    def threads(self) -> int:
        return threads_here()

    def item(self, index: int) -> Any:
        """Return what a row holds; the row group that it is in is kept until a row of another is asked for."""
        ends = self.state.ends or list(accumulate(rows for _, _, rows in self.groups))
        number = bisect_right(ends, index)
        path, group, rows = self.groups[number]
        with self.state.lock:
            self.state.ends = ends
            if self.state.number != number:
                table = parquet_file(path).read_row_group(group, columns=[self.column])
                self.state.number, self.state.group = number, table.column(0)
            held = self.state.group
        item = held[index - (ends[number] - rows)].as_py()
        inner = item.get("path") if isinstance(item, dict) and item.get("bytes") is None else None
        return path.parent / inner if inner else item

    def name(self, index: int) -> str:
        return f"row {index}"

    def digest(self) -> str:
        return short_digest(footer for path in self.paths for footer in (path.name.encode(), footer_of(path)))


class ProcessLocal:
    """What a process remembers of the rows that it read last; not sent to another."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.ends: list[int] = []
        self.number, self.group = -1, None  # type: int, Any

    def __reduce__(self) -> tuple[type[ProcessLocal], tuple[()]]:
        return ProcessLocal, ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Whatever has a length and photos by number; read in the thread that asks, for who knows what it minds."""

    photos: Any
    kind = "dataset"
    threads = 1

    def __len__(self) -> int:
        return len(self.photos)

    def item(self, index: int) -> Any:
        try:
            return self.photos[index]
        except Exception as error:
            raise PhotoRefused(f"photo {index} of the dataset cannot be read: {error!r}") from error

    def name(self, index: int) -> str:
        return f"photo {index}"

    def digest(self) -> str:
        return short_digest([type(self.photos).__qualname__.encode(), *map(self.sample, self.sampled)])

    @property
    def sampled(self) -> list[int]:
        return sorted({(len(self) - 1) * part // (SAMPLES - 1) for part in range(SAMPLES)})

    def sample(self, index: int) -> bytes:
        """Return what tells one photo from others, as far as it can be read."""
        try:
            found = plain(self.item(index))
            if isinstance(found, Image.Image):
                return found.tobytes()
            return (
                found
                if isinstance(found, bytes)
                else str(found).encode()
                if isinstance(found, str | Path)
                else (np.ascontiguousarray(np.asarray(found)).tobytes())
            )
        except PhotoRefused:
            return b""


def open_source(source: str) -> FolderFiles | ParquetRows | Dataset:
    """Return the photos of a place, or of what a callable returns."""
    path = Path(source)
    if path.is_dir():
        return in_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return in_parquet([path])
        raise PhotoRefused(f"{path} is one file; photos come from a folder, a .parquet file or package.module:callable")
    module, colon, name = source.partition(":")
    if colon and name.isidentifier() and all(one.isidentifier() for one in module.split(".")):
        return dataset_of(called(module, name))
    raise PhotoRefused(f"there is no {source}; photos come from a folder, a .parquet file or package.module:callable")


def in_folder(folder: Path) -> FolderFiles | ParquetRows:
    """Return the photos of a folder, by name; where there are only Parquet files, the rows of these."""
    inside = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if paths := [path for path in inside if path.suffix.lower() in SUFFIXES]:
        return FolderFiles(tuple(paths))
    if paths := [path for path in inside if path.suffix.lower() == ".parquet"]:
        return in_parquet(paths)
    raise PhotoRefused(f"there is no photo in {folder}; photos are {', '.join(SUFFIXES)}, or rows of .parquet files")


def in_parquet(paths: Sequence[Path]) -> ParquetRows:
    """Return the rows of Parquet files that have their photos in the same column."""
    column, groups = "", []
    for path in paths:
        file = parquet_file(path)
        column = photo_column(path, file.schema_arrow)
        facts = file.metadata
        groups += [(path, group, facts.row_group(group).num_rows) for group in range(facts.num_row_groups)]
    return ParquetRows(tuple(paths), column, tuple(groups))


def parquet_file(path: Path) -> Any:
    """Return an opened Parquet file."""
    parquet = require_extra("pyarrow.parquet", "ray")
    try:
        return parquet.ParquetFile(path)
    except (OSError, sys.modules["pyarrow"].ArrowException) as error:
        raise PhotoRefused(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error


def photo_column(path: Path, schema: Any) -> str:
    """Return which column holds photos: `image` or `img`, else the one of bytes, or of Hugging Face's structure."""
    import pyarrow.types as kinds

    def fits(kind: Any) -> bool:
        inside = {kind.field(index).name for index in range(kind.num_fields)} if kinds.is_struct(kind) else set()
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or "bytes" in inside)

    able = [one.name for one in schema if fits(one.type)]
    named = [one for one in KEYS if one in able]
    if not named and len(able) != 1:
        names = ", ".join(schema.names)
        raise PhotoRefused(f"{path} has no column of photos ({names}); call the one with their bytes 'image'")
    return named[0] if named else able[0]


def footer_of(path: Path) -> bytes:
    """Return what a Parquet file says about itself: the end of it, whose length stands before the last four bytes."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return file.read()


def called(module: str, name: str) -> Any:
    """Return what a callable of the user's returns."""
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PhotoRefused(f"{module}:{name} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    try:
        return maker()
    except Exception as error:
        raise PhotoRefused(f"{module}:{name}() failed: {error!r}; it has to return a dataset of photos") from error


def dataset_of(source: Any) -> FolderFiles | Dataset:
    """Return a dataset's photos; a list of paths means the files."""
    if isinstance(source, Mapping) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise InvalidRequest(
            f"photos come from something with a length and photos by number, not from {type(source).__name__}; "
            "give a folder, a .parquet file, package.module:callable, or a dataset"
        )
    if isinstance(source, list | tuple) and source and all(isinstance(one, str | Path) for one in source):
        return FolderFiles(tuple(map(Path, source)))
    return Dataset(source)


def short_digest(pieces: Iterable[bytes]) -> str:
    """Return 32 hexadecimal digits that change with any of the pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:32]


def plain(item: Any) -> Any:
    """Return the photo itself of what a dataset returns, which may hold a label too.

    Raises:
        PhotoRefused: there is none in it.
    """
    if isinstance(item, Mapping):
        if isinstance(item.get("bytes"), bytes) or ("path" in item and "bytes" in item):
            return item["bytes"] if item["bytes"] is not None else item["path"]
        key = next((one for one in KEYS if one in item), None)
        if key is None:
            raise PhotoRefused(f"a photo is under 'image' of a dataset's row, which has {', '.join(map(str, item))}")
        return plain(item[key])
    return plain(item[0]) if isinstance(item, tuple | list) and len(item) else item
