"""The pictures of a layer after each epoch of a training: of its kernels, or of filters that were rendered."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phosphene.images import display
from phosphene.inspection.kernels import LARGEST, SCALE_IN_RMS, SMALLEST, STYLES, as_levels
from phosphene.training.history import History

WeightRange = tuple[float, float, float, int]  # of the finite weights: lowest, highest, sum of squares, number
SIDES = (160, 128, 96, 64, 48)  # pixels of a rendered picture's longer side


class LayerTimeline(ABC):
    """The pictures of a layer after each epoch."""

    noun: str  # what is pictured, `kernels` or `filters`
    epochs: list[int]  # those that have pictures
    names: list[str]  # of the filters, short
    shape: tuple[int, int, int, int]  # (filters, lines, h, w); several lines if each input channel has its own picture
    scale: tuple[float, float, str] | None = None  # the lowest and highest number, and the colour map
    caption: tuple[str, ...]  # parts of it

    @abstractmethod
    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        """Return (filters, lines, h, w, 3) uint8 pictures after an epoch, and (filters, lines) which are not finite."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (h, w) that a tile may have, the largest first."""


class KernelTimeline(LayerTimeline):
    """The kernels of a layer."""

    noun = "kernels"

    def __init__(self, history: History, layer: str, style: str) -> None:
        self.history, self.layer, self.epochs = history, layer, history.epochs
        first = history.kernels(layer, self.epochs[0])
        filters, channels, height, width = first.weights.shape
        self.colour_order = first.spec["colours"] if style == "signed" else None
        self.names = [str(number) for number in range(filters)]
        self.shape = (filters, 1 if self.colour_order else channels, height, width)
        self.colormap, about_zero = STYLES[style]
        ranges = [weight_range(history.kernels(layer, epoch).weights) for epoch in self.epochs]
        self.low, self.high = common_scale(ranges, about_zero)
        self.scale = None if self.colour_order else (self.low, self.high, self.colormap)
        colour = f", in colour: grey is 0, full colour ±{self.high:.3g}" if self.colour_order else ""
        all_finite = all(count == first.weights.numel() for _, _, _, count in ranges)
        crossed = () if all_finite else ("crossed out: NaN or infinity",)
        self.caption = (f"{height}×{width}{colour}", "one scale for all epochs", *crossed)

    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        weights = self.history.kernels(self.layer, epoch).weights[:filters, : None if self.colour_order else lines]
        nonfinite = ~weights.isfinite().flatten(2).all(2)
        levels = as_levels(weights.nan_to_num(0, 0, 0), self.low, self.high)
        if not self.colour_order:
            return display.apply_colormap(levels, self.colormap), nonfinite
        colours = levels.flip(1) if self.colour_order == "bgr" else levels
        return colours.permute(0, 2, 3, 1)[:, None], nonfinite.any(1, keepdim=True)

    def sizes(self) -> list[tuple[int, int]]:
        return enlarged(self.shape[2:], LARGEST if self.shape[1] > 1 else 2 * LARGEST)


class FilterTimeline(LayerTimeline):
    """The pictures of a layer's filters that were rendered after each epoch."""

    noun = "filters"

    def __init__(self, history: History, epochs: list[int]) -> None:
        self.history, self.epochs = history, epochs
        pictures = history.filters(epochs[-1])
        width, height = next(iter(pictures.values())).size
        self.names = [name.rpartition("_")[2] for name in pictures]
        self.shape = (len(pictures), 1, height, width)
        self.caption = ("what they respond to, rendered from the same seed each time",)

    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        pictures = list(self.history.filters(epoch).values())[:filters]
        tiles = [torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures]
        return torch.stack(tiles)[:, None], torch.zeros(filters, 1, dtype=torch.bool)

    def sizes(self) -> list[tuple[int, int]]:
        height, width = self.shape[2:]
        longer = max(height, width)
        if longer < SIDES[-2]:
            return enlarged((height, width), SIDES[-3])
        sides = [side for side in SIDES if side <= longer]
        return [(max(1, height * side // longer), max(1, width * side // longer)) for side in sides]


def weight_range(weights: Tensor) -> WeightRange:
    """Return the range of a kernel's finite weights."""
    finite = weights[weights.isfinite()].double()
    if not len(finite):
        return math.inf, -math.inf, 0.0, 0
    return float(finite.min()), float(finite.max()), float(finite.square().sum()), len(finite)


def common_scale(ranges: Sequence[WeightRange], about_zero: bool) -> tuple[float, float]:
    """Return the lowest and highest number of the scale that kernels of several epochs share; see `kernels.scale`."""
    lows, highs, squares, counts = zip(*ranges, strict=True)
    low, high, count = min(lows), max(highs), sum(counts)
    if count and (about_zero or low == high):
        high = min(max(abs(low), abs(high)), SCALE_IN_RMS * math.sqrt(sum(squares) / count)) or 1.0
        low = -high
    return (low, high) if count else (-1.0, 1.0)


def enlarged(size: tuple[int, int], largest: int) -> list[tuple[int, int]]:
    """Return the sizes of a tile enlarged by whole factors, up to a longer side of `largest`, the largest first."""
    height, width = size
    least = math.ceil(SMALLEST / max(size))
    factors = range(max(least, largest // max(size)), least - 1, -1)
    return [(height * factor, width * factor) for factor in factors]
