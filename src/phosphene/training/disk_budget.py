"""How many bytes a record takes on the disk, and whether its cap allows that."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.training.epoch_record import EpochRecord


def check_cap(store: Path, epoch_bytes: int, epochs: int, cap: int) -> None:
    """Refuse in advance a record of so many epochs, of so many bytes each, that would exceed its cap."""
    before = folder_bytes(store) if store.is_dir() else 0
    total = epochs * epoch_bytes
    if before + total > cap:
        already = f", besides {in_bytes(before)} already recorded" if before else ""
        raise InvalidRequest(
            f"{epochs} epoch{'s' * (epochs > 1)} of up to {in_bytes(epoch_bytes)} are {in_bytes(total)}{already}, and "
            f"the cap is {in_bytes(cap)}: record fewer layers, gradients=None or every=10, or give a larger cap"
        )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def record_bytes(record: EpochRecord) -> int:
    """Return how many bytes an epoch's record takes on the disk at most."""
    kernels = [kernels.weights for kernels in record.kernels.values()]
    gradients = [gradient.mean for gradient in record.gradients.values()]
    return bytes_per_epoch(kernels, gradients, 0 if record.filters is None else record.filters.images.numel())


def bytes_per_epoch(kernels: Sequence[Tensor], gradients: Sequence[Tensor], pixels: int) -> int:
    """Return how many bytes arrays and pictures take on the disk at most, including the text about them.

    A gradient's histogram is a line for each power of two; pictures are stored singly and as a grid, compressed.
    """
    arrays = sum(array.nbytes for array in (*kernels, *gradients))
    return arrays + 2_000 + 200 * len(kernels) + 1_500 * len(gradients) + (2 * pixels + 20_000 if pixels else 0)


def in_bytes(count: int) -> str:
    """Return a number of bytes for a message: "45.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
