"""How a number of every channel spreads over photos: a state of fixed size that can be merged in any order.

Mean and deviation are merged as by Chan, Golub and LeVeque (1979). Quantiles come from a histogram over the logarithm
of the magnitude, as in DDSketch (Masson 2019, arXiv:1908.10693), a side a sign, which keeps the octave of the largest
magnitude seen and the eight below it: what is smaller counts as zero. The histogram is therefore a function of the
numbers alone, not of the order they came in: what counted as zero below one octave does so below a higher one, too.

A quantile is off by at most 1.1 % of itself (`RELATIVE`), or by 0.4 % of the largest magnitude (`ABSOLUTE`) where that
is more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS, OCTAVES = 32, 9  # bins an octave of magnitudes, and octaves that are told apart
SIDE = STEPS * OCTAVES  # bins a sign
RELATIVE, ABSOLUTE = (2 ** (1 / STEPS) - 1) / (2 ** (1 / STEPS) + 1), 2.0 ** (1 - OCTAVES)
NOWHERE = -(2**20)  # the magnitude of zero: below that of any number


class QuantileSketch(NamedTuple):
    """What is known of one number a photo, of each of c channels.

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
        """Return (c,) about the value below which that share of the photos is; NaN without photos.

        It stands for the one at rank round(share · (count - 1)) of the sorted values, counted from 0.
        """
        rank = (share * (self.counted - 1).clamp(min=0).double()).round().long()
        found = (self.bins.cumsum(1) <= rank[:, None]).sum(1).clamp(max=2 * SIDE)
        values = value_of(found, self.edge).clamp(self.lowest, self.highest)
        return torch.where(self.counted > 0, values, torch.nan)


def empty_sketch(channels: int) -> QuantileSketch:
    """Return the state before the first photo."""
    counted, broken, edge = torch.tensor([0, 0, NOWHERE])[:, None].repeat(1, channels)
    mean, squares, lowest, highest = torch.tensor([0, 0, torch.inf, -torch.inf]).double()[:, None].repeat(1, channels)
    bins = torch.zeros(channels, 2 * SIDE + 1, dtype=torch.int32)
    return QuantileSketch(counted, broken, mean, squares, lowest, highest, edge, bins)


def sketch_of(state: QuantileSketch, values: Tensor, sound: Tensor) -> QuantileSketch:
    """Return a state with values (b, c), float64, added where they are `sound`; its bins are changed in place."""
    whole = bool(sound.all())  # as it mostly is
    there, low, high = (values if whole else values.where(sound, other) for other in (0, torch.inf, -torch.inf))
    count = sound.sum(0)
    mean = there.sum(0) / count.clamp(min=1)
    squares = (values - mean).square_() if whole else (values - mean).where(sound, 0).square_()
    magnitudes = magnitude(there)
    # whole octaves, so that the bins have to be moved but rarely
    octave = magnitudes.amax(0).div(STEPS, rounding_mode="floor")
    edge = torch.maximum(state.edge, octave * STEPS + STEPS - 1)
    shift_bins(state.bins, edge - state.edge)
    places = place_of(there, edge - magnitudes) + (2 * SIDE + 1) * torch.arange(values.shape[1])
    state.bins.view(-1).scatter_add_(0, places.flatten(), sound.flatten().int())
    batch = QuantileSketch(count, len(sound) - count, mean, squares.sum(0), low.amin(0), high.amax(0), edge, state.bins)
    return merge_moments(state, batch)


def merge_sketches(one: QuantileSketch, other: QuantileSketch) -> QuantileSketch:
    """Return the state of the photos of two, which are different ones."""
    edge = torch.maximum(one.edge, other.edge)
    bins = one.bins.clone(), other.bins.clone()
    for own, state in zip(bins, (one, other), strict=True):
        shift_bins(own, edge - state.edge)
    return merge_moments(one, other)._replace(edge=edge, bins=bins[0] + bins[1])


def merge_moments(one: QuantileSketch, other: QuantileSketch) -> QuantileSketch:
    """Return two lots of photos together, with the edge and the bins of the second."""
    counted = one.counted + other.counted
    share = other.counted.double() / counted.clamp(min=1)
    apart = other.mean - one.mean
    return other._replace(
        counted=counted,
        broken=one.broken + other.broken,
        mean=one.mean + apart * share,
        squares=one.squares + other.squares + apart.square() * one.counted * share,
        lowest=torch.minimum(one.lowest, other.lowest),
        highest=torch.maximum(one.highest, other.highest),
    )


def magnitude(values: Tensor) -> Tensor:
    """Return the magnitude bin of each number: STEPS bins an octave, `NOWHERE` for 0."""
    found = (values.abs().log2() * STEPS).floor()
    return torch.where(values == 0, NOWHERE, found).long()


def place_of(values: Tensor, below: Tensor) -> Tensor:
    """Return the column of each number, which is `below` so many magnitude bins under its channel's edge."""
    side = torch.where(values < 0, below, 2 * SIDE - below)
    return torch.where((below >= SIDE) | (values == 0), SIDE, side)


def value_of(columns: Tensor, edge: Tensor) -> Tensor:
    """Return the value in the middle of a column (c,): no number of its bin is off by more than `RELATIVE`."""
    below = torch.where(columns < SIDE, columns, 2 * SIDE - columns)
    low = torch.exp2((edge - below) / STEPS)
    middle = low * (1 + RELATIVE)
    return torch.where(columns == SIDE, 0, torch.where(columns < SIDE, -middle, middle))


def shift_bins(bins: Tensor, higher: Tensor) -> None:
    """Move the bins of each channel in place as its edge goes `higher` (c,): what falls out counts as zero."""
    rows = ((higher > 0) & (higher < -NOWHERE // 2)).nonzero()[:, 0]  # zeros alone stay where they are
    if not len(rows):
        return
    old, by = bins[rows], higher[rows, None].clamp(max=SIDE)
    sides = old[:, :SIDE], old[:, SIDE + 1 :].flip(1)  # from the edge inwards
    from_where = torch.arange(SIDE) - by
    moved = [one.gather(1, from_where.clamp(min=0)).where(from_where >= 0, 0) for one in sides]
    fallen = old.sum(1) - sum(one.sum(1) for one in moved)
    bins[rows] = torch.cat([moved[0], fallen[:, None].int(), moved[1].flip(1)], 1)
