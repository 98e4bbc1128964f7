"""Where on the image the numbers of a layer lie: maps of any layout, and tokens that stand for patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from phosphene.errors import LayerRefused
from phosphene.network.layers import Layer

MOST_SKEW = 2.0  # a map whose proportions differ from the image's by more is taken for something else
MOST_EXTRA_TOKENS = 16  # class, distillation and register tokens, which stand before those of the grid


def as_map(tensor: Tensor, layer: Layer, images: Tensor) -> Tensor:
    """Return what a layer returned for images (b, c, H, W), or its gradient, as a map (b, c, h, w).

    Maps with their channels last, and tokens (b, n, d), are told by the image: their grid has its proportions, and for
    tokens a whole number of pixels a cell; the fewest possible further tokens stand before the grid.

    Raises:
        LayerRefused: it is no such thing, or has a single position.
    """
    shape, sides = tuple(tensor.shape), (images.shape[-2], images.shape[-1])
    found: Tensor | None = None
    if tensor.dim() == 4 and len(tensor) == len(images):
        first, last = aspect_mismatch(shape[2:], sides), aspect_mismatch(shape[1:3], sides)
        if map_is_certain(layer, sides) or (layer.is_map and first <= min(last, MOST_SKEW)):
            found = tensor
        elif last <= MOST_SKEW:
            found = tensor.permute(0, 3, 1, 2)
    elif tensor.dim() == 3 and len(tensor) == len(images):
        grid = token_grid(shape[1], sides)
        found = tensor[:, -grid[0] * grid[1] :].mT.reshape(len(tensor), shape[2], *grid) if grid else None
    if found is None:
        raise LayerRefused(f"{layer.path} returns {shape}, in which no map of the image is known")
    if max(found.shape[2:]) == 1:
        raise LayerRefused(f"{layer.path} returns a single position, so there is no map")
    return found


def aspect_mismatch(pair: Sequence[int], sides: Sequence[int]) -> float:
    """Return by which factor, at least 1, the proportions of two numbers differ from those of an image."""
    factor = pair[0] * sides[1] / (pair[1] * sides[0])
    return max(factor, 1 / factor)


def map_is_certain(layer: Layer, sides: Sequence[int]) -> bool:
    """Return whether a layer's table row is right that it is a map: its positions were followed, or fit the image."""
    return layer.size is not None and (layer.sees == "part" or aspect_mismatch(layer.size, sides) <= MOST_SKEW)


def token_grid(count: int, sides: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (h, w) that so many tokens of an image with these sides make, None if they make none."""
    patches = [size for size in range(1, min(sides) + 1) if sides[0] % size == 0 and sides[1] % size == 0]
    for extra in range(min(MOST_EXTRA_TOKENS, count) + 1):
        for size in patches:
            grid = sides[0] // size, sides[1] // size
            if grid[0] * grid[1] == count - extra > 1:
                return grid
    return None


def as_map_or_none(tensor: Tensor | None, layer: Layer, images: Tensor) -> Tensor | None:
    """Return `as_map`, or None where there is none."""
    try:
        return None if tensor is None else as_map(tensor, layer, images)
    except LayerRefused:
        return None
