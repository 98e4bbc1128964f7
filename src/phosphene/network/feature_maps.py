"""The map of the image that a layer's output holds: in any layout, or as tokens that stand for patches."""

from collections.abc import Sequence

from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.network.layers import Layer

MAX_ASPECT_MISMATCH = 2.0  # two dimensions whose proportions differ from the image's by more are no map of it
MAX_EXTRA_TOKENS = 16  # class, distillation and register tokens, which come before those of the grid


def as_map(tensor: Tensor, layer: Layer, images: Tensor) -> Tensor:
    """Return what a layer returned for images (b, c, H, W), or its gradient, as a map (b, c, h, w).

    Maps with their channels last, and tokens (b, n, d), are recognised by a grid of the image's proportions. A cell
    of tokens is a whole number of pixels wide; of several grids, that with the fewest extra tokens counts.

    Raises:
        LayerRefused: it is neither, or has a single position.
    """
    shape, size = tuple(tensor.shape), (images.shape[-2], images.shape[-1])
    features: Tensor | None = None
    if tensor.dim() == 4 and len(tensor) == len(images):
        first, last = aspect_mismatch(shape[2:], size), aspect_mismatch(shape[1:3], size)
        if map_is_certain(layer, size) or (layer.is_map and first <= min(last, MAX_ASPECT_MISMATCH)):
            features = tensor
        elif last <= MAX_ASPECT_MISMATCH:
            features = tensor.permute(0, 3, 1, 2)
    elif tensor.dim() == 3 and len(tensor) == len(images) and (grid := token_grid(shape[1], size)):
        features = tensor[:, -grid[0] * grid[1] :].mT.reshape(len(tensor), shape[2], *grid)
    if features is None:
        raise LayerRefused(f"{layer.path} returns {shape}, in which no map of the image is known")
    if max(features.shape[2:]) == 1:
        raise LayerRefused(f"{layer.path} returns a single position, so there is no map")
    return features


def aspect_mismatch(pair: Sequence[int], size: Sequence[int]) -> float:
    """Return the factor, at least 1, by which the proportions of two numbers differ from those of an image (h, w)."""
    factor = pair[0] * size[1] / (pair[1] * size[0])
    return max(factor, 1 / factor)


def map_is_certain(layer: Layer, size: Sequence[int]) -> bool:
    """Return whether a layer's table row is surely a map: its receptive field is known, or its proportions fit."""
    certain = layer.sees == "part"
    return layer.size is not None and (certain or aspect_mismatch(layer.size, size) <= MAX_ASPECT_MISMATCH)


def token_grid(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (h, w) that `count` tokens of an image (h, w) form, None if they form none."""
    patches = [side for side in range(1, min(size) + 1) if size[0] % side == 0 and size[1] % side == 0]
    for extra in range(min(MAX_EXTRA_TOKENS, count) + 1):
        for side in patches:
            grid = size[0] // side, size[1] // side
            if grid[0] * grid[1] == count - extra > 1:
                return grid
    return None


def as_map_or_none(tensor: Tensor | None, layer: Layer, images: Tensor) -> Tensor | None:
    """Return the map of a layer's output as `as_map` does, None if there is no tensor or no map in it."""
    try:
        return None if tensor is None else as_map(tensor, layer, images)
    except LayerRefused:
        return None
