"""What there is to see of a layer after each epoch of a training: its kernels, or filters that were rendered."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phosphene.images import display
from phosphene.inspection.kernels import LARGEST, SCALE_IN_RMS, SMALLEST, STYLES, as_levels
from phosphene.training.history import History

SIDES = (160, 128, 96, 64, 48)  # pixels of a rendered picture's longer side


class LayerTimeline(ABC):
    """What there is to see of a layer: kernels, or rendered filters.

    Attributes:
        noun: what they are.
        epochs: those that hold any.
        names: of the filters, in short.
        shape: (filters, lines, h, w); lines are the input channels that kernels are drawn apart for.
        scale: the lowest and highest number, and the colour map; None where there is none.
        said: for the caption.
    """

    noun: str
    epochs: list[int]
    names: list[str]
    shape: tuple[int, int, int, int]
    scale: tuple[float, float, str] | None = None
    said: tuple[str, ...]

    @abstractmethod
    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        """Return the first filters and lines after an epoch, (filters, lines, h, w, 3), uint8, and which are broken."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (h, w) at which a tile may be shown, the largest first."""


class KernelTimeline(LayerTimeline):
    """The kernels of a layer, as a look."""

    noun = "kernels"

    def __init__(self, history: History, layer: str, style: str) -> None:
        self.history, self.layer, self.epochs = history, layer, history.epochs
        first = history.kernels(layer, self.epochs[0])
        count, channels, height, width = first.weights.shape
        self.order = first.spec["colours"] if style == "signed" else None
        self.names = [str(one) for one in range(count)]
        self.shape = (count, 1 if self.order else channels, height, width)
        self.colours, about_zero = STYLES[style]
        measured = [measure(history.kernels(layer, epoch).weights) for epoch in self.epochs]
        self.low, self.high = common_scale(measured, about_zero)
        self.scale = None if self.order else (self.low, self.high, self.colours)
        colour = f", in colour: grey is 0, full colour ±{self.high:.3g}" if self.order else ""
        sound = all(one[-1] == first.weights.numel() for one in measured)
        crossed = () if sound else ("crossed out: NaN or infinity",)
        self.said = (f"{height}×{width}{colour}", "one scale for all epochs", *crossed)

    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        weights = self.history.kernels(self.layer, epoch).weights[:filters, : None if self.order else lines]
        broken = ~weights.isfinite().flatten(2).all(2)
        levels = as_levels(weights.nan_to_num(0, 0, 0), self.low, self.high)
        if not self.order:
            return display.apply_colormap(levels, self.colours), broken
        colours = levels.flip(1) if self.order == "bgr" else levels
        return colours.permute(0, 2, 3, 1)[:, None], broken.any(1, keepdim=True)

    def sizes(self) -> list[tuple[int, int]]:
        return enlarged(self.shape[2:], LARGEST if self.shape[1] > 1 else 2 * LARGEST)


class FilterTimeline(LayerTimeline):
    """The pictures that were rendered of a layer's filters, as a look."""

    noun = "filters"

    def __init__(self, history: History, epochs: list[int]) -> None:
        self.history, self.epochs = history, epochs
        pictures = history.filters(epochs[-1])
        width, height = next(iter(pictures.values())).size
        self.names = [name.rpartition("_")[2] for name in pictures]
        self.shape = (len(pictures), 1, height, width)
        self.said = ("what they respond to, rendered from the same seed each time",)

    def tiles(self, epoch: int, filters: int, lines: int) -> tuple[Tensor, Tensor]:
        pictures = list(self.history.filters(epoch).values())[:filters]
        tiles = [torch.from_numpy(np.array(one.convert("RGB"))) for one in pictures]
        return torch.stack(tiles)[:, None], torch.zeros(filters, 1, dtype=torch.bool)

    def sizes(self) -> list[tuple[int, int]]:
        height, width = self.shape[2:]
        longer = max(height, width)
        if longer < SIDES[-2]:
            return enlarged((height, width), SIDES[-3])
        return [(max(1, height * one // longer), max(1, width * one // longer)) for one in SIDES if one <= longer]


def measure(weights: Tensor) -> tuple[float, float, float, int]:
    """Return of the weights that are finite the lowest, the highest, the sum of the squares, and how many they are."""
    finite = weights[weights.isfinite()].double()
    if not len(finite):
        return math.inf, -math.inf, 0.0, 0
    return float(finite.min()), float(finite.max()), float(finite.square().sum()), len(finite)


def common_scale(epochs: Sequence[tuple[float, float, float, int]], about_zero: bool) -> tuple[float, float]:
    """Return the lowest and highest number of the scale that kernels of several epochs share; see `kernels.scale`."""
    lows, highs, squares, counts = zip(*epochs, strict=True)
    low, high, count = min(lows), max(highs), sum(counts)
    if count and (about_zero or low == high):
        high = min(max(abs(low), abs(high)), SCALE_IN_RMS * math.sqrt(sum(squares) / count)) or 1.0
        low = -high
    return (low, high) if count else (-1.0, 1.0)


def enlarged(size: tuple[int, int], largest: int) -> list[tuple[int, int]]:
    """Return the sizes of a tile enlarged by whole factors until its longer side is `largest`, the largest first."""
    height, width = size
    least = math.ceil(SMALLEST / max(size))
    factors = range(max(least, largest // max(size)), least - 1, -1)
    return [(height * factor, width * factor) for factor in factors]
