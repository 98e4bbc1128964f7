"""The distribution over photos of one number for each channel: a result of fixed size that can be merged in any order.

Mean and deviation are merged as by Chan, Golub and LeVeque (1979). Quantiles come from a histogram over the logarithm
of the magnitude, as in DDSketch (Masson 2019, arXiv:1908.10693), with one half for each sign, which keeps the octave of
the largest magnitude seen and the eight below it: what is smaller counts as zero. The histogram is therefore a function
of the numbers alone, not of their order: what counts as zero below one octave does so below a higher one, too.

A quantile is off by at most 1.1 % of itself (`RELATIVE`), or by 0.4 % of the largest magnitude (`ABSOLUTE`) if that
is more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS, OCTAVES = 32, 9  # bins per octave of magnitudes, and octaves of the histogram
SIDE = STEPS * OCTAVES  # bins per sign
RELATIVE, ABSOLUTE = (2 ** (1 / STEPS) - 1) / (2 ** (1 / STEPS) + 1), 2.0 ** (1 - OCTAVES)
ZERO_BIN = -(2**20)  # the magnitude bin of zero: below that of any number


class QuantileSketch(NamedTuple):
    """For each of c channels, the distribution of one number per photo.

    Attributes:
        counted: (c,) int64, photos.
        broken: (c,) int64, photos left out because the channel held NaN or infinity.
        mean: (c,) float64; `squares`: (c,) the sum of squared differences from it.
        lowest, highest: (c,) float64; +inf and -inf before the first photo.
        edge: (c,) int64, the last magnitude bin of the octave of the largest magnitude.
        bins: (c, 2 · SIDE + 1) int32, photos by value, ascending; the middle one is zero. Good for 2·10⁹ photos.
    """

    counted: Tensor
    broken: Tensor
    mean: Tensor
    squares: Tensor
    lowest: Tensor
    highest: Tensor
    edge: Tensor
    bins: Tensor

    @property
    def deviation(self) -> Tensor:
        """The standard deviation (c,) of the photos counted (over n, not n - 1); NaN without any."""
        return (self.squares / self.counted).sqrt()

    def quantile(self, share: float) -> Tensor:
        """Return (c,) roughly the value below which this share of the photos lies; NaN without photos.

        It approximates the value at rank round(share · (count - 1)) of the sorted values, counted from 0.
        """
        rank = (share * (self.counted - 1).clamp(min=0).double()).round().long()
        columns = (self.bins.cumsum(1) <= rank[:, None]).sum(1).clamp(max=2 * SIDE)
        values = value_of(columns, self.edge).clamp(self.lowest, self.highest)
        return torch.where(self.counted > 0, values, torch.nan)


def empty_sketch(channels: int) -> QuantileSketch:
    """Return the result before the first photo."""
    counted, broken, edge = torch.tensor([0, 0, ZERO_BIN])[:, None].repeat(1, channels)
    mean, squares, lowest, highest = torch.tensor([0, 0, torch.inf, -torch.inf]).double()[:, None].repeat(1, channels)
    bins = torch.zeros(channels, 2 * SIDE + 1, dtype=torch.int32)
    return QuantileSketch(counted, broken, mean, squares, lowest, highest, edge, bins)


def add_values(sketch: QuantileSketch, values: Tensor, finite: Tensor) -> QuantileSketch:
    """Return a sketch with values (b, c), float64, added where they are `finite`; its bins are changed in place."""
    whole = bool(finite.all())  # as it mostly is
    filled, low, high = (values if whole else values.where(finite, fill) for fill in (0, torch.inf, -torch.inf))
    count = finite.sum(0)
    mean = filled.sum(0) / count.clamp(min=1)
    squares = (values - mean).square_() if whole else (values - mean).where(finite, 0).square_()
    magnitudes = magnitude_bin(filled)
    # whole octaves, so that the bins are rarely shifted
    octave = magnitudes.amax(0).div(STEPS, rounding_mode="floor")
    edge = torch.maximum(sketch.edge, octave * STEPS + STEPS - 1)
    shift_bins(sketch.bins, edge - sketch.edge)
    indices = column_of(filled, edge - magnitudes) + (2 * SIDE + 1) * torch.arange(values.shape[1])
    sketch.bins.view(-1).scatter_add_(0, indices.flatten(), finite.flatten().int())
    broken = len(finite) - count
    batch = QuantileSketch(count, broken, mean, squares.sum(0), low.amin(0), high.amax(0), edge, sketch.bins)
    return merge_moments(sketch, batch)


def merge_sketches(first: QuantileSketch, second: QuantileSketch) -> QuantileSketch:
    """Return the sketch of the photos of two, which have none in common."""
    edge = torch.maximum(first.edge, second.edge)
    bins = first.bins.clone(), second.bins.clone()
    for shifted, sketch in zip(bins, (first, second), strict=True):
        shift_bins(shifted, edge - sketch.edge)
    return merge_moments(first, second)._replace(edge=edge, bins=bins[0] + bins[1])


def merge_moments(first: QuantileSketch, second: QuantileSketch) -> QuantileSketch:
    """Return two sketches merged, with the edge and the bins of the second."""
    counted = first.counted + second.counted
    share = second.counted.double() / counted.clamp(min=1)
    difference = second.mean - first.mean
    return second._replace(
        counted=counted,
        broken=first.broken + second.broken,
        mean=first.mean + difference * share,
        squares=first.squares + second.squares + difference.square() * first.counted * share,
        lowest=torch.minimum(first.lowest, second.lowest),
        highest=torch.maximum(first.highest, second.highest),
    )


def magnitude_bin(values: Tensor) -> Tensor:
    """Return the magnitude bin of each number: STEPS bins per octave, `ZERO_BIN` for 0."""
    bins = (values.abs().log2() * STEPS).floor()
    return torch.where(values == 0, ZERO_BIN, bins).long()


def column_of(values: Tensor, below: Tensor) -> Tensor:
    """Return the column of each number, whose magnitude bin is `below` so many bins under its channel's edge."""
    column = torch.where(values < 0, below, 2 * SIDE - below)
    return torch.where((below >= SIDE) | (values == 0), SIDE, column)


def value_of(columns: Tensor, edge: Tensor) -> Tensor:
    """Return the value in the middle of a column (c,): no number of its bin is off by more than `RELATIVE`."""
    below = torch.where(columns < SIDE, columns, 2 * SIDE - columns)
    low = torch.exp2((edge - below) / STEPS)
    middle = low * (1 + RELATIVE)
    return torch.where(columns == SIDE, 0, torch.where(columns < SIDE, -middle, middle))


def shift_bins(bins: Tensor, rise: Tensor) -> None:
    """Shift the bins of each channel in place as its edge rises (c,): what falls out counts as zero."""
    channels = ((rise > 0) & (rise < -ZERO_BIN // 2)).nonzero()[:, 0]  # zeros alone stay where they are
    if not len(channels):
        return
    old, distance = bins[channels], rise[channels, None].clamp(max=SIDE)
    halves = old[:, :SIDE], old[:, SIDE + 1 :].flip(1)  # from the edge inwards
    sources = torch.arange(SIDE) - distance
    shifted = [half.gather(1, sources.clamp(min=0)).where(sources >= 0, 0) for half in halves]
    zeros = old.sum(1) - sum(half.sum(1) for half in shifted)
    bins[channels] = torch.cat([shifted[0], zeros[:, None].int(), shifted[1].flip(1)], 1)
