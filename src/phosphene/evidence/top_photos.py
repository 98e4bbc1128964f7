"""The strongest photos of every channel: a state of fixed size, which is the same however it was put together.

Photos are ordered by their peak, the highest first, and among equal peaks by their number, the lowest first. That order
is total, so the first k of all photos are among the first k of any part that holds them. A picture that comes twice,
told by its mark, stands once: at its highest peak, there with its lowest number. That keeps the rule: what stands above
an entry in a part stands above it in the whole, or something higher of the same mark does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1  # the number of the photo where there are fewer than k


class TopPhotos(NamedTuple):
    """Of each of c channels the k photos with the highest peaks, in order.

    Attributes:
        peaks: (c, k) float64, the highest value of the channel's map; -inf where there are fewer photos.
        photos: (c, k) int64, the photos' numbers; `NONE` where there are fewer.
        places: (c, k, 2) int64, row and column of the peak in the map.
        marks: (c, k) int64, the same for two photos that are the same picture.
    """

    peaks: Tensor
    photos: Tensor
    places: Tensor
    marks: Tensor

    def rows(self, chosen: Tensor) -> TopPhotos:
        """Return the entries of some channels."""
        return TopPhotos(*(one[chosen] for one in self))

    def reordered(self, order: Tensor) -> TopPhotos:
        """Return the entries of each channel in another order (c, m)."""
        places = self.places.gather(1, order[..., None].expand(-1, -1, 2))
        peaks, photos, marks = (one.gather(1, order) for one in (self.peaks, self.photos, self.marks))
        return TopPhotos(peaks, photos, places, marks)


def no_photos(channels: int, top: int) -> TopPhotos:
    """Return the state before the first photo."""
    whole = torch.full((channels, top), NONE)
    places = torch.zeros(channels, top, 2, dtype=torch.long)
    return TopPhotos(
        torch.full((channels, top), -torch.inf, dtype=torch.float64), whole, places, torch.zeros_like(whole)
    )


def stronger(one: TopPhotos, other: TopPhotos) -> TopPhotos:
    """Return the strongest photos of two states of the same channels and k, whose photos are different ones."""
    both = beside(one, other)
    return ranked(both.reordered(both.photos.argsort(dim=1, stable=True)), one.photos.shape[1])


def add(state: TopPhotos, peaks: Tensor, photos: Tensor, places: Tensor, marks: Tensor, entering: Tensor) -> None:
    """Add a batch to a state, in place.

    Args:
        state: of photos with lower numbers only.
        peaks: (b, c) float64.
        photos: (b,), ascending.
        places: (b, c, 2).
        marks: (b,).
        entering: (b, c) whether the peak is higher than the lowest of the state; the others are left out.
    """
    rows = entering.any(0).nonzero()[:, 0]
    if not len(rows):
        return
    enters = entering[:, rows].T
    shape = (len(rows), len(photos))
    batch = TopPhotos(
        torch.where(enters, peaks[:, rows].T, -torch.inf),
        torch.where(enters, photos.expand(shape), NONE),
        places[:, rows].transpose(0, 1),
        marks.expand(shape),
    )
    top = state.photos.shape[1]
    for old, new in zip(state, ranked(beside(state.rows(rows), batch), top), strict=True):
        old[rows] = new


def beside(one: TopPhotos, other: TopPhotos) -> TopPhotos:
    return TopPhotos(*(torch.cat(pair, 1) for pair in zip(one, other, strict=True)))


def ranked(entries: TopPhotos, top: int) -> TopPhotos:
    """Return the first `top` of each channel's entries (c, m), one a mark; those of equal peaks come in order."""
    order = entries.peaks.argsort(dim=1, descending=True, stable=True)
    first = entries.reordered(order[:, :top])
    rows = repeated(first).any(1).nonzero()[:, 0]
    if len(rows):  # rare: only where a picture shows twice does it matter what comes after the first
        several = entries.rows(rows).reordered(order[rows])
        settled = several.reordered(repeated(several).byte().argsort(dim=1, stable=True)[:, :top])
        for old, new in zip(first, settled, strict=True):
            old[rows] = new
    return first


def repeated(entries: TopPhotos) -> Tensor:
    """Return (c, m) whether an entry is a picture that stands before it in its channel."""
    there = entries.photos != NONE
    same = (entries.marks[:, :, None] == entries.marks[:, None, :]) & there[:, None, :] & there[:, :, None]
    return same.tril(-1).any(2)
