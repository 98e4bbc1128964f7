"""How many pictures climb at once.

On CPUs a few are as fast as many: from eight on, a picture's step costs the same within a tenth at every size and depth
that was tried, and memory grows. A GPU wants enough to do between two launches. Either way no more go at once than the
memory that is free holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from phosphene.errors import InvalidRequest
from phosphene.network.model import Model

AT_ONCE = {"cpu": 8}
ELSEWHERE = 64
TRANSIENT = 3  # what a step takes at its peak, over its maps: their gradients, and what an operation works in
SHARE = 0.8  # of the free memory that may be taken
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def chosen_batch(model: Model, batch: int | str, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return how many pictures of a size (h, w) go at once through a network up to the last of some layers.

    Raises:
        InvalidRequest: it is no number.
    """
    check_batch(batch)
    if isinstance(batch, int):
        return batch
    device = model.like.device
    wanted, free = AT_ONCE.get(device.type, ELSEWHERE), free_memory(device)
    if free is None:
        return wanted
    return max(1, min(wanted, int(SHARE * free / (TRANSIENT * bytes_of_maps(model, paths, size)))))


def check_batch(batch: int | str) -> None:
    """Refuse what is neither `auto` nor a number of pictures."""
    if batch != "auto" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise InvalidRequest(f"batch is 'auto' or a whole number of at least 1, not {batch!r}")


def bytes_of_maps(model: Model, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return what all maps up to the last of some layers take for one picture of a size, from the table of layers."""
    table = list(model.layers())
    last = max((place for place, layer in enumerate(table) if layer.path in paths), default=len(table) - 1)
    maps = sum((one.channels or 0) * one.size[0] * one.size[1] for one in table[: last + 1] if one.size)
    grown = size[0] * size[1] / (model.input_size[0] * model.input_size[1])
    return int((maps * grown + model.channels_in * size[0] * size[1]) * model.like.element_size())


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes can still be had on a device, None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(free_of_system(), default=None) if device.type == "cpu" else None


def free_of_system() -> Iterator[int]:
    """Yield the bytes that Linux has left, for everybody and for the group of processes that this one is in."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        yield int(lines["MemAvailable"].split()[0]) * 1024
        most, taken = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            yield int(most) - int(taken)
    except (OSError, KeyError, ValueError):
        return
