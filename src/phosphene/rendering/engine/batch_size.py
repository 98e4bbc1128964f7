"""How many pictures climb at once.

On CPUs a few are as fast as many: from eight on, a picture's step costs the same within a tenth at every size and depth
that was tried, and memory grows. A GPU wants enough to do between two launches. Either way no more go at once than the
memory that is free holds.
"""

from __future__ import annotations

from collections.abc import Collection

from phosphene.arguments import whole_number
from phosphene.network.memory import free_memory
from phosphene.network.model import Model

AT_ONCE = {"cpu": 8}
DEFAULT_BATCH = 64
TRANSIENT = 3  # what a step takes at its peak, over its maps: their gradients, and what an operation works in
MEMORY_SHARE = 0.8  # of the free memory that may be taken


def chosen_batch(model: Model, batch: int | str, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return how many pictures of a size (h, w) go at once through a network up to the last of some layers.

    Raises:
        InvalidRequest: it is no number.
    """
    check_batch(batch)
    if isinstance(batch, int):
        return batch
    device = model.like.device
    wanted, free = AT_ONCE.get(device.type, DEFAULT_BATCH), free_memory(device)
    if free is None:
        return wanted
    return max(1, min(wanted, int(MEMORY_SHARE * free / (TRANSIENT * bytes_of_maps(model, paths, size)))))


def check_batch(batch: int | str) -> None:
    """Refuse what is neither `auto` nor a number of pictures."""
    if batch != "auto":
        whole_number(batch, "batch is 'auto' or", 1)


def bytes_of_maps(model: Model, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return what all maps up to the last of some layers take for one picture of a size, from the table of layers."""
    table = list(model.layers())
    last = max((place for place, layer in enumerate(table) if layer.path in paths), default=len(table) - 1)
    maps = sum((one.channels or 0) * one.size[0] * one.size[1] for one in table[: last + 1] if one.size)
    grown = size[0] * size[1] / (model.input_size[0] * model.input_size[1])
    return int((maps * grown + model.channels_in * size[0] * size[1]) * model.like.element_size())
