"""Sources of many photos: files of a folder, rows of Parquet files, or a dataset of the user's own."""

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

KEYS = ("image", "img")  # of the photo in a dataset's row
SAMPLES = 3  # photos of a dataset that its digest is taken from


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """Files of photos, in the order of their names."""

    paths: tuple[Path, ...]
    kind = "files"
    parallel = True

    def __len__(self) -> int:
        return len(self.paths)

    def row(self, index: int) -> Path:
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
    parallel = True

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.groups)

    def row(self, index: int) -> Any:
        """Return a row; its row group stays in memory until a row of another group is read."""
        ends = self.state.ends or list(accumulate(rows for _, _, rows in self.groups))
        number = bisect_right(ends, index)
        path, group, rows = self.groups[number]
        with self.state.lock:
            self.state.ends = ends
            if self.state.number != number:
                table = parquet_file(path).read_row_group(group, columns=[self.column])
                self.state.number, self.state.column = number, table.column(0)
            column = self.state.column
        row = column[index - (ends[number] - rows)].as_py()
        name = row.get("path") if isinstance(row, dict) and row.get("bytes") is None else None
        return path.parent / name if name else row

    def name(self, index: int) -> str:
        return f"row {index}"

    def digest(self) -> str:
        return short_digest(footer for path in self.paths for footer in (path.name.encode(), footer_of(path)))


class ProcessLocal:
    """The row group that a process read last; it is not sent to another process."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.ends: list[int] = []
        self.number, self.column = -1, None  # type: int, Any

    def __reduce__(self) -> tuple[type[ProcessLocal], tuple[()]]:
        return ProcessLocal, ()


@dataclass(frozen=True, eq=False)
class UserDataset:
    """Anything with a length and photos by number; read in the calling thread, since it may not allow others."""

    photos: Any
    kind = "dataset"
    parallel = False

    def __len__(self) -> int:
        return len(self.photos)

    def row(self, index: int) -> Any:
        try:
            return self.photos[index]
        except Exception as error:
            raise PhotoRefused(f"photo {index} of the dataset cannot be read: {error!r}") from error

    def name(self, index: int) -> str:
        return f"photo {index}"

    def digest(self) -> str:
        return short_digest([type(self.photos).__qualname__.encode(), *map(self.photo_bytes, self.samples)])

    @property
    def samples(self) -> list[int]:
        return sorted({(len(self) - 1) * part // (SAMPLES - 1) for part in range(SAMPLES)})

    def photo_bytes(self, index: int) -> bytes:
        """Return bytes that identify a photo, none if it cannot be read."""
        try:
            photo = unwrap(self.row(index))
        except PhotoRefused:
            return b""
        if isinstance(photo, bytes):
            return photo
        if isinstance(photo, str | Path):
            return str(photo).encode()
        return photo.tobytes() if isinstance(photo, Image.Image) else np.ascontiguousarray(photo).tobytes()


def open_source(source: str) -> FolderFiles | ParquetRows | UserDataset:
    """Return the photos of a folder or a Parquet file, or those of the dataset that a callable returns."""
    path = Path(source)
    if path.is_dir():
        return files_in_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return rows_of_parquet([path])
        raise PhotoRefused(f"{path} is one file; photos come from a folder, a .parquet file or package.module:callable")
    module, colon, name = source.partition(":")
    if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return dataset_source(call_factory(module, name))
    raise PhotoRefused(f"there is no {source}; photos come from a folder, a .parquet file or package.module:callable")


def files_in_folder(folder: Path) -> FolderFiles | ParquetRows:
    """Return the photos of a folder, by name; if it has only Parquet files, their rows."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if paths := [path for path in files if path.suffix.lower() in SUFFIXES]:
        return FolderFiles(tuple(paths))
    if paths := [path for path in files if path.suffix.lower() == ".parquet"]:
        return rows_of_parquet(paths)
    raise PhotoRefused(f"there is no photo in {folder}; photos are {', '.join(SUFFIXES)}, or rows of .parquet files")


def rows_of_parquet(paths: Sequence[Path]) -> ParquetRows:
    """Return the rows of Parquet files that have their photos in the same column."""
    column, groups = "", []
    for path in paths:
        file = parquet_file(path)
        column = photo_column(path, file.schema_arrow)
        metadata = file.metadata
        groups += [(path, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
    return ParquetRows(tuple(paths), column, tuple(groups))


def parquet_file(path: Path) -> Any:
    parquet = require_extra("pyarrow.parquet", "ray")
    try:
        return parquet.ParquetFile(path)
    except (OSError, sys.modules["pyarrow"].ArrowException) as error:
        raise PhotoRefused(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error


def photo_column(path: Path, schema: Any) -> str:
    """Return which column holds photos: `image` or `img`, else the only one of bytes or of Hugging Face's structure."""
    from pyarrow import types

    def fits(kind: Any) -> bool:
        fields = {kind.field(index).name for index in range(kind.num_fields)} if types.is_struct(kind) else set()
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or "bytes" in fields)

    columns = [column.name for column in schema if fits(column.type)]
    named = [key for key in KEYS if key in columns]
    if not named and len(columns) != 1:
        names = ", ".join(schema.names)
        raise PhotoRefused(f"{path} has no column of photos ({names}); name the column with their bytes 'image'")
    return (named or columns)[0]


def footer_of(path: Path) -> bytes:
    """Return the metadata at the end of a Parquet file; its length precedes the last four bytes."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return file.read()


def call_factory(module: str, name: str) -> Any:
    """Return the dataset that a callable of the user's returns."""
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PhotoRefused(f"{module}:{name} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
    try:
        return factory()
    except Exception as error:
        raise PhotoRefused(f"{module}:{name}() failed: {error!r}; it has to return a dataset of photos") from error


def dataset_source(source: Any) -> FolderFiles | UserDataset:
    """Return the source of a dataset; a list of paths means the files."""
    if isinstance(source, Mapping) or not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise InvalidRequest(
            f"photos come from something with a length and photos by number, not from {type(source).__name__}; "
            "give a folder, a .parquet file, package.module:callable, or a dataset"
        )
    if isinstance(source, list | tuple) and source and all(isinstance(path, str | Path) for path in source):
        return FolderFiles(tuple(map(Path, source)))
    return UserDataset(source)


def short_digest(pieces: Iterable[bytes]) -> str:
    """Return 32 hexadecimal digits that change with any of the pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:32]


def unwrap(row: Any) -> Any:
    """Return the photo in a row of a dataset, which may hold a label too.

    Raises:
        PhotoRefused: there is none in it.
    """
    if isinstance(row, Mapping):
        if isinstance(row.get("bytes"), bytes) or ("path" in row and "bytes" in row):
            return row["bytes"] if row["bytes"] is not None else row["path"]
        key = next((key for key in KEYS if key in row), None)
        if key is None:
            raise PhotoRefused(f"a photo is under 'image' of a dataset's row, which has {', '.join(map(str, row))}")
        return unwrap(row[key])
    return unwrap(row[0]) if isinstance(row, tuple | list) and len(row) else row
