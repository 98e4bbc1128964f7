"""How many pictures are rendered at once.

On a CPU, batches of more than eight pictures save less than a tenth of the time per picture, at every size and depth
that was tried, but take more memory. A GPU needs more work per launch. Either way a batch fits the free memory.
"""

from collections.abc import Collection

from phosphene.arguments import whole_number
from phosphene.network.memory import free_memory
from phosphene.network.model import Model

BATCH_SIZES = {"cpu": 8}
DEFAULT_BATCH = 64
PEAK_FACTOR = 3  # peak memory of a step over that of its maps, as gradients and workspace come on top
MEMORY_SHARE = 0.8  # of the free memory that may be used


def chosen_batch(model: Model, batch: int | str, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return how many pictures of a size (h, w) to run at once through a network up to the last of some layers.

    Raises:
        InvalidRequest: `batch` is neither `auto` nor a whole number of at least 1.
    """
    check_batch(batch)
    if batch != "auto":
        return int(batch)
    device = model.prototype_tensor.device
    most, free = BATCH_SIZES.get(device.type, DEFAULT_BATCH), free_memory(device)
    if free is None:
        return most
    return max(1, min(most, int(MEMORY_SHARE * free / (PEAK_FACTOR * bytes_of_maps(model, paths, size)))))


def check_batch(batch: int | str) -> None:
    """Refuse a batch that is neither `auto` nor a whole number of at least 1."""
    if batch != "auto":
        whole_number(batch, "batch, unless 'auto',", 1)


def bytes_of_maps(model: Model, paths: Collection[str], size: tuple[int, int]) -> int:
    """Return the memory of all maps up to the last of some layers, for one picture of a size, by the layer table."""
    layers = list(model.layers())
    last = max((index for index, layer in enumerate(layers) if layer.path in paths), default=len(layers) - 1)
    maps = sum((layer.channels or 0) * layer.size[0] * layer.size[1] for layer in layers[: last + 1] if layer.size)
    enlargement = size[0] * size[1] / (model.input_size[0] * model.input_size[1])
    return int((maps * enlargement + model.channels_in * size[0] * size[1]) * model.prototype_tensor.element_size())
