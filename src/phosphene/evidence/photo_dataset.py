"""Many photos, by number: files of a folder, rows of Parquet files, or a dataset of the user's own.

Each photo is read on request, as `photo.read` reads a file. A dataset may return a photo as a PIL image, a tensor
(c, h, w) or array (h, w, c) of bytes or of numbers in [0, 1], the bytes of an image file, its path, Hugging Face's
{"bytes", "path"}, or one of these as the first of a tuple, or under "image" or "img" of a mapping.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import PhotoRefused
from phosphene.evidence.photo_sources import FolderFiles, ParquetRows, UserDataset, dataset_source, open_source, unwrap
from phosphene.images.photo import FORMATS, MAX_PIXELS, check_size, read, refusing_bad_files, to_tensor

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in grey (ITU-R BT.601), as Pillow has them
READ_AHEAD = 64  # photos
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class PhotoDataset:
    """Photos by number, each read anew on every request.

    Attributes:
        source: where they come from.
        channels: of each photo, 3 for RGB, 1 for grey; of a dataset's tensors any number.
    """

    source: FolderFiles | ParquetRows | UserDataset
    channels: int = 3

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"PhotoDataset({len(self):,} from {self.source.kind})"

    def __getitem__(self, index: int) -> Tensor:
        """Return a photo (1, c, h, w) float32 in [0, 1].

        Raises:
            PhotoRefused: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no photo {index}: there are {len(self)}, counted from 0")
        return decode_photo(self.source.row(index), self.name(index), self.channels)

    def name(self, index: int) -> str:
        """Return a photo's name for messages: its file's name, or its number."""
        return self.source.name(index)

    def with_channels(self, channels: int) -> PhotoDataset:
        """Return the same photos for a network that sees another number of channels."""
        return replace(self, channels=channels)

    @property
    def spec(self) -> dict[str, Any]:
        """The identity of these photos, in JSON terms.

        It follows from the names and sizes of files, the footers of Parquet files, or a few photos of a dataset: a
        change that leaves all these alone goes unnoticed.
        """
        return {"kind": self.source.kind, "count": len(self), "digest": self.source.digest()}

    def map_in_order(self, indices: Iterable[int], function: Callable[[int], Result]) -> Iterator[Result]:
        """Yield function(index) of the indices in order, computed ahead in threads if the source allows that."""
        if not self.source.parallel:
            yield from map(function, indices)
            return
        remaining, waiting = iter(indices), deque[Future[Result]]()
        pool = ThreadPoolExecutor(thread_count(), "phosphene-photos")
        try:
            waiting.extend(pool.submit(function, index) for index in islice(remaining, READ_AHEAD))
            while waiting:
                first = waiting.popleft().result()
                waiting.extend(pool.submit(function, index) for index in islice(remaining, 1))
                yield first
        finally:
            pool.shutdown(cancel_futures=True)


def thread_count() -> int:
    """Return how many photos are read at once."""
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2))


def open_photos(source: str | Path | Any, channels: int = 3) -> PhotoDataset:
    """Return the photos of a source.

    Args:
        source: a folder of photos or of Parquet files, a Parquet file, `package.module:callable`, which is called
            without arguments and returns a dataset, a list of files, or a dataset: anything with a length and photos by
            number, such as torchvision's and Hugging Face's.
        channels: 3 for RGB or 1 for grey, as the network expects; another number only for a dataset of tensors.

    Raises:
        PhotoRefused: there is no such source, or no photo in it.
        InvalidRequest: it is no source of photos.
        ExtraMissing: Parquet needs pyarrow, which is not installed.

    Example:
        >>> open_photos("holiday")[0].shape
        torch.Size([1, 3, 480, 640])
    """
    if isinstance(source, PhotoDataset):
        return source.with_channels(channels)
    is_place = isinstance(source, str | Path)
    opened = open_source(str(source)) if is_place else dataset_source(source)
    if len(opened) == 0:
        raise PhotoRefused(
            f"there is no photo in {source if is_place else f'the {type(source).__name__}'}: it is empty"
        )
    return PhotoDataset(opened, channels)


def decode_photo(row: Any, name: str, channels: int) -> Tensor:
    """Return a photo (1, c, h, w) float32 in [0, 1] from a row of a source.

    Raises:
        PhotoRefused: the row holds none.
    """
    photo = unwrap(row)
    if isinstance(photo, bytes):
        return from_bytes(photo, name, channels)
    if isinstance(photo, str | Path):
        return read(photo, channels)
    if isinstance(photo, Image.Image):
        return from_picture(photo, name, channels)
    if isinstance(photo, np.ndarray) and photo.ndim in (2, 3):
        # a copy, since the dataset's own array may be read-only
        photo = torch.from_numpy(np.array(photo[..., None] if photo.ndim == 2 else photo)).movedim(-1, 0)
    if isinstance(photo, Tensor):
        return from_tensor(photo, name, channels)
    raise PhotoRefused(f"{name} is no photo but {type(photo).__name__}; give PIL images, tensors (c, h, w) or files")


def from_bytes(content: bytes, name: str, channels: int) -> Tensor:
    """Return the photo of an image file's bytes."""
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # damaged bytes may raise anything
        raise PhotoRefused(f"{name} is no image that can be read ({len(content)} bytes)") from error
    return from_picture(opened, name, channels)


def from_picture(picture: Image.Image, name: str, channels: int) -> Tensor:
    """Return the photo of a PIL image, as `photo.read` returns a file's."""
    if channels not in (1, 3):
        raise PhotoRefused(f"{name} has 3 channels or 1; this network sees {channels}: give a dataset of tensors")
    with refusing_bad_files(name, MAX_PIXELS):
        check_size(name, picture)
        return to_tensor(name, picture, channels)


def from_tensor(tensor: Tensor, name: str, channels: int) -> Tensor:
    """Return the photo of a tensor (c, h, w), or (h, w) of grey: bytes, or numbers in [0, 1]."""
    photo = (tensor[None] if tensor.dim() == 2 else tensor).detach().cpu()
    if photo.dim() != 3 or photo.numel() == 0 or not (photo.dtype == torch.uint8 or photo.is_floating_point()):
        raise PhotoRefused(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; a photo is (c, h, w), bytes or numbers in 0..1"
        )
    photo = photo.float() / 255 if photo.dtype == torch.uint8 else photo.float()
    low, high = map(float, photo.aminmax())
    if not -1e-3 <= low <= high <= 1 + 1e-3:  # NaN compares false
        raise PhotoRefused(
            f"{name} has numbers from {low:.3g} to {high:.3g}; a photo's are in 0..1: leave out the normalisation, "
            "since the network does its own"
        )
    if len(photo) == 1 and channels == 3:
        photo = photo.expand(3, -1, -1)
    elif len(photo) == 3 and channels == 1:
        photo = torch.einsum("chw,c->hw", photo, torch.tensor(LUMA))[None]
    if len(photo) != channels:
        raise PhotoRefused(f"{name} has {len(photo)} channels; this network sees {channels}")
    return photo.clamp(0, 1).contiguous()[None]
