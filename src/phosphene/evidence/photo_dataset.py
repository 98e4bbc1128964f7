"""Many photos, by number: files of a folder, rows of Parquet files, or a dataset of the user's own.

Each photo is read when it is asked for, as `photo.read` reads a file. What a dataset returns for a photo may be a PIL
image, a tensor (c, h, w) or array (h, w, c) of bytes or of numbers in [0, 1], the bytes of an image file, the path of
one, Hugging Face's {"bytes", "path"}, or one of these as the first of a tuple, or under "image" or "img" of a mapping.
"""

from __future__ import annotations

import io
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
from phosphene.evidence.photo_sources import Dataset, FolderFiles, ParquetRows, dataset_of, open_source, plain
from phosphene.images.photo import FORMATS, check_size, read, to_tensor

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in grey (ITU-R BT.601), as Pillow has them
AHEAD = 64  # photos that are read before they are asked for
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class PhotoDataset:
    """Photos by number, each read anew whenever it is asked for.

    Attributes:
        source: what they come from.
        channels: of each photo, 3 for RGB, 1 for grey; of a dataset's tensors any number.
    """

    source: FolderFiles | ParquetRows | Dataset
    channels: int = 3

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"Photos({len(self):,} from {self.source.kind})"

    def __getitem__(self, index: int) -> Tensor:
        """Return a photo (1, c, h, w) float32 in [0, 1].

        Raises:
            PhotoRefused: it cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no photo {index}: there are {len(self)}, counted from 0")
        return decoded(self.source.item(index), self.name(index), self.channels)

    def name(self, index: int) -> str:
        """Return how to speak of a photo: its file's name, or its number."""
        return self.source.name(index)

    def of(self, channels: int) -> PhotoDataset:
        """Return the same photos for a network that sees so many channels."""
        return replace(self, channels=channels)

    @property
    def spec(self) -> dict[str, Any]:
        """What tells these photos from others, in JSON terms.

        It is taken from names and sizes of files, from what a Parquet file says about itself, or from a few photos of a
        dataset: a change that leaves all these alone goes unnoticed.
        """
        return {"kind": self.source.kind, "count": len(self), "digest": self.source.digest()}

    def each(self, indices: Iterable[int], make: Callable[[int], Made]) -> Iterator[Made]:
        """Yield make(index) of every index in order, made ahead in the background where the source can stand that."""
        if self.source.threads < 2:
            yield from map(make, indices)
            return
        coming, waiting = iter(indices), deque[Future[Made]]()
        pool = ThreadPoolExecutor(self.source.threads, "phosphene-photos")
        try:
            waiting.extend(pool.submit(make, index) for index in islice(coming, AHEAD))
            while waiting:
                first = waiting.popleft().result()
                waiting.extend(pool.submit(make, index) for index in islice(coming, 1))
                yield first
        finally:
            pool.shutdown(cancel_futures=True)


def open_photos(source: str | Path | Any, channels: int = 3) -> PhotoDataset:
    """Return the photos of a source.

    Args:
        source: a folder of photos or of Parquet files, a Parquet file, `package.module:callable`, which is called
            without arguments and returns a dataset, a list of files, or a dataset: anything with a length and photos by
            number, such as torchvision's and Hugging Face's.
        channels: what the network sees, 3 for RGB or 1 for grey; another number only for a dataset of tensors.

    Raises:
        PhotoRefused: there is no such source, or no photo in it.
        InvalidRequest: it is no source of photos.
        ExtraMissing: Parquet needs pyarrow, which is not installed.

    Example:
        >>> open_photos("holiday")[0].shape
        torch.Size([1, 3, 480, 640])
    """
    if isinstance(source, PhotoDataset):
        return source.of(channels)
    found = open_source(str(source)) if isinstance(source, str | Path) else dataset_of(source)
    if len(found) == 0:
        raise PhotoRefused(f"there is no photo in {shown(source)}: it is empty")
    return PhotoDataset(found, channels)


def shown(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def decoded(item: Any, name: str, channels: int) -> Tensor:
    """Return a photo (1, c, h, w) float32 in [0, 1] of whatever holds one.

    Raises:
        PhotoRefused: nothing does.
    """
    found = plain(item)
    if isinstance(found, bytes):
        return from_bytes(found, name, channels)
    if isinstance(found, str | Path):
        return read(found, channels)
    if isinstance(found, Image.Image):
        return from_picture(found, name, channels)
    if isinstance(found, np.ndarray) and found.ndim in (2, 3):
        # a copy, for the dataset may not let its own be written to
        found = torch.from_numpy(np.array(found[..., None] if found.ndim == 2 else found)).movedim(-1, 0)
    if isinstance(found, Tensor):
        return from_tensor(found, name, channels)
    raise PhotoRefused(f"{name} is no photo but {type(found).__name__}; give PIL images, tensors (c, h, w) or files")


def from_bytes(content: bytes, name: str, channels: int) -> Tensor:
    """Return the photo of an image file's bytes."""
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # what damaged bytes raise is anything at all
        raise PhotoRefused(f"{name} is no image that can be read ({len(content)} bytes)") from error
    return from_picture(opened, name, channels)


def from_picture(picture: Image.Image, name: str, channels: int) -> Tensor:
    """Return the photo of a PIL image, as `photo.read` returns a file's."""
    if channels not in (1, 3):
        raise PhotoRefused(f"{name} has 3 channels or 1; this network sees {channels}: give a dataset of tensors")
    try:
        check_size(Path(name), picture)
        return to_tensor(Path(name), picture, channels)
    except PhotoRefused:
        raise
    except Exception as error:  # as above
        raise PhotoRefused(f"{name} cannot be read, it may be damaged or cut short: {error}") from error


def from_tensor(tensor: Tensor, name: str, channels: int) -> Tensor:
    """Return the photo of a tensor (c, h, w), or (h, w) of grey: bytes, or numbers in [0, 1]."""
    photo = (tensor[None] if tensor.dim() == 2 else tensor).detach().cpu()
    if photo.dim() != 3 or photo.numel() == 0 or not (photo.dtype == torch.uint8 or photo.is_floating_point()):
        raise PhotoRefused(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; a photo is (c, h, w), bytes or numbers in 0..1"
        )
    photo = photo.float() / 255 if photo.dtype == torch.uint8 else photo.float()
    low, high = (float(one) for one in photo.aminmax())
    if not -1e-3 <= low <= high <= 1 + 1e-3:  # NaN compares false
        raise PhotoRefused(
            f"{name} has numbers from {low:.3g} to {high:.3g}; a photo's are in 0..1: leave out the normalisation, "
            "which the network has its own of"
        )
    if len(photo) == 1 and channels == 3:
        photo = photo.expand(3, -1, -1)
    elif len(photo) == 3 and channels == 1:
        photo = torch.einsum("chw,c->hw", photo, torch.tensor(LUMA))[None]
    if len(photo) != channels:
        raise PhotoRefused(f"{name} has {len(photo)} channels; this network sees {channels}")
    return photo.clamp(0, 1).contiguous()[None]
