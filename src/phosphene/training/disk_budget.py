"""What a record takes on the disk, and whether that may be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.training.history import EpochRecord, size_of


def check_cap(store: Path, each: int, count: int, cap: int) -> None:
    """Refuse in advance a record of so many epochs, of so many bytes each, that would outgrow its cap.

    Raises:
        InvalidRequest: the message has the figures.
    """
    before = size_of(store) if store.is_dir() else 0
    if before + count * each > cap:
        already = f", beside {in_bytes(before)} that are there" if before else ""
        raise InvalidRequest(
            f"{count} epoch{'s' * (count > 1)} of up to {in_bytes(each)} are {in_bytes(count * each)}{already}, and "
            f"the cap is {in_bytes(cap)}: record fewer layers, gradients=None or every=10, or give a larger cap"
        )


def bytes_of(entry: EpochRecord) -> int:
    """Return what an entry takes on the disk at most."""
    kernels = [one.weights for one in entry.kernels.values()]
    return bytes_per_epoch(
        kernels,
        [one.mean for one in entry.gradients.values()],
        0 if entry.filters is None else entry.filters.images.numel(),
    )


def bytes_per_epoch(kernels: Sequence[Tensor], gradients: Sequence[Tensor], pixels: int) -> int:
    """Return what arrays and pictures take on the disk at most, with what is written about them.

    A gradient's histogram is a line for each power of two; pictures are there singly and as a grid, before packing.
    """
    arrays = sum(one.nbytes for one in (*kernels, *gradients))
    return arrays + 2_000 + 200 * len(kernels) + 1_500 * len(gradients) + (2 * pixels + 20_000 if pixels else 0)


def in_bytes(count: int) -> str:
    """Return a number of bytes for a message: "45.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
