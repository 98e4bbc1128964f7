"""The strongest photos of every channel: a result of fixed size, which is the same in whatever order it is merged.

Photos are ordered by their peak, the highest first, and among equal peaks by their number, the lowest first. That order
is total, so the first k of all photos are among the first k of any part that holds them. An image that comes twice, as
its hash tells, is listed once: at its highest peak, and of equal peaks with its lowest number. Merging stays exact:
what comes before an entry in a part also does so in the whole, or a higher entry of the same hash does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NO_PHOTO = -1  # the number of the photo if there are fewer than k


class TopPhotos(NamedTuple):
    """For each of c channels, the k photos with the highest peaks, in order.

    Attributes:
        peaks: (c, k) float64, the highest value of the channel's map; -inf if there are fewer photos.
        photos: (c, k) int64, the photos' numbers; `NO_PHOTO` if there are fewer.
        positions: (c, k, 2) int64, row and column of the peak in the map.
        image_hashes: (c, k) int64, equal for two photos that are the same image.
    """

    peaks: Tensor
    photos: Tensor
    positions: Tensor
    image_hashes: Tensor

    def channels(self, chosen: Tensor) -> TopPhotos:
        """Return the entries of chosen channels."""
        return TopPhotos(*(field[chosen] for field in self))

    def reordered(self, order: Tensor) -> TopPhotos:
        """Return the entries of each channel in another order (c, m)."""
        positions = self.positions.gather(1, order[..., None].expand(-1, -1, 2))
        peaks, photos, hashes = (field.gather(1, order) for field in (self.peaks, self.photos, self.image_hashes))
        return TopPhotos(peaks, photos, positions, hashes)


def empty_top_photos(channels: int, top: int) -> TopPhotos:
    """Return the result before the first photo."""
    peaks = torch.full((channels, top), -torch.inf, dtype=torch.float64)
    photos = torch.full((channels, top), NO_PHOTO)
    return TopPhotos(peaks, photos, torch.zeros(channels, top, 2, dtype=torch.long), torch.zeros_like(photos))


def merge_top_photos(first: TopPhotos, second: TopPhotos) -> TopPhotos:
    """Return the strongest photos of two results of the same channels and k, which have no photo in common."""
    both = concatenate(first, second)
    return rank(both.reordered(both.photos.argsort(dim=1, stable=True)), first.photos.shape[1])


def add_photos(
    top: TopPhotos, peaks: Tensor, photos: Tensor, positions: Tensor, image_hashes: Tensor, enters: Tensor
) -> None:
    """Add a batch to a result, in place.

    Args:
        top: of photos with lower numbers only.
        peaks: (b, c) float64.
        photos: (b,), ascending.
        positions: (b, c, 2).
        image_hashes: (b,).
        enters: (b, c) whether the peak is higher than the lowest of the result; the others are left out.
    """
    channels = enters.any(0).nonzero()[:, 0]
    if not len(channels):
        return
    mask = enters[:, channels].T
    shape = (len(channels), len(photos))
    batch = TopPhotos(
        torch.where(mask, peaks[:, channels].T, -torch.inf),
        torch.where(mask, photos.expand(shape), NO_PHOTO),
        positions[:, channels].transpose(0, 1),
        image_hashes.expand(shape),
    )
    ranked = rank(concatenate(top.channels(channels), batch), top.photos.shape[1])
    for old, new in zip(top, ranked, strict=True):
        old[channels] = new


def concatenate(first: TopPhotos, second: TopPhotos) -> TopPhotos:
    return TopPhotos(*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))


def rank(entries: TopPhotos, top: int) -> TopPhotos:
    """Return the first `top` of each channel's entries (c, m), one per hash; those of equal peaks come in order."""
    order = entries.peaks.argsort(dim=1, descending=True, stable=True)
    first = entries.reordered(order[:, :top])
    channels = is_repeated(first).any(1).nonzero()[:, 0]
    if len(channels):  # rare: entries after the first `top` matter only if an image is among these twice
        entire = entries.channels(channels).reordered(order[channels])
        distinct = entire.reordered(is_repeated(entire).byte().argsort(dim=1, stable=True)[:, :top])
        for old, new in zip(first, distinct, strict=True):
            old[channels] = new
    return first


def is_repeated(entries: TopPhotos) -> Tensor:
    """Return (c, m) whether an earlier entry of the same channel is the same image."""
    hashes, exists = entries.image_hashes, entries.photos != NO_PHOTO
    same = (hashes[:, :, None] == hashes[:, None, :]) & exists[:, None, :] & exists[:, :, None]
    return same.tril(-1).any(2)
