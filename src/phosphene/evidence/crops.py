"""Sheets of crops: what each channel's strongest photos show where the channel answers, and sheets of these photos.

A row a channel, the strongest photo first. A tile is the receptive field of the peak, as the network saw the photo
there; what of it lies outside the photo is grey. Where the field is unknown, or holds the photo, that is the photo.
The photos whole, as the network saw them, are small tiles in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import PhotoRefused
from phosphene.evidence.photo_pass import PhotoPass, RefusedPhoto
from phosphene.evidence.top_photos import NONE
from phosphene.images.display import Picture
from phosphene.images.encode import webp
from phosphene.images.grid import EMPTY, picture
from phosphene.images.sprites import thumbnail, tile_size
from phosphene.network.layers import Layer

TILE = 64  # pixels of a tile's longer side
ROWS = 128  # channels of a sheet, which keeps it below the 16,383 px that WebP ends at
QUALITY, EFFORT = 80, 2  # of WebP: twice as quick as at effort 4, for a twentieth more bytes
AT_ONCE = 2**29  # bytes of the sheets that are filled at the same time
PHOTO, ACROSS = 112, 5  # pixels of a whole photo's longer side at most, and photos along a sheet's either side
MOST = 20_000  # photos that are shown whole, about 80 MB
OUTSIDE = (128, 128, 128)  # about what a network sees beyond the border, where it pads with zeros
COARSE = 16  # pixels up to which a field is enlarged as squares; a larger one is smoothed


class Window(NamedTuple):
    """A part of an image, in its pixels; it may go beyond the border."""

    top: int
    left: int
    height: int
    width: int


class TopPositions(NamedTuple):
    """The strongest photos of a layer's channels, (c, k), and the places (c, k, 2) of their peaks."""

    photos: Tensor
    places: Tensor


def window(layer: Layer, place: tuple[int, int], size: tuple[int, int]) -> Window:
    """Return what a place (row, column) of a layer's map sees of an image of a size (h, w)."""
    field = layer.receptive_field
    if field is None or (field.size[0] >= size[0] and field.size[1] >= size[1]):
        return Window(0, 0, *size)
    top, left = (at * stride - padding for at, stride, padding in zip(place, field.stride, field.padding, strict=True))
    return Window(top, left, *field.size)


def crop(image: Picture, part: Window) -> Picture:
    """Return a part of an image as a tile of `TILE` pixels, what lies outside in grey."""
    longer = max(part.width, part.height)
    width, height = (max(1, round(side * TILE / longer)) for side in (part.width, part.height))
    way = Image.Resampling.NEAREST if longer <= COARSE else Image.Resampling.BICUBIC
    box = part.left, part.top, part.left + part.width, part.top + part.height
    if box[0] < 0 or box[1] < 0 or box[2] > image.width or box[3] > image.height:
        seen = Image.new("RGB", (part.width, part.height), OUTSIDE)
        seen.paste(image, (-part.left, -part.top))
        shrunk = seen.resize((width, height), way)
    else:
        shrunk = image.resize((width, height), way, box)
    if shrunk.size == (TILE, TILE):
        return shrunk
    tile = Image.new("RGB", (TILE, TILE), EMPTY)
    tile.paste(shrunk, ((TILE - width) // 2, (TILE - height) // 2))
    return tile


def names(number: int, channels: int) -> list[str]:
    """Return the files of a layer's sheets; the n-th holds the channels from n · ROWS on."""
    return [name_of(number, page) for page in range(-(-channels // ROWS))]


def name_of(number: int, page: int) -> str:
    """Return the file of one of a layer's sheets."""
    return f"crops_{number}_{page}.webp"


def whole(found: Sequence[TopPositions]) -> list[int]:
    """Return the numbers of the photos that are shown whole, ascending: all of the strongest, if not more than `MOST`.

    Else these are the strongest of a channel first, then those that come second somewhere, and so on.
    """
    by_rank = dict.fromkeys(torch.cat([one.photos for one in found]).T.flatten().tolist())
    by_rank.pop(NONE, None)
    return sorted(list(by_rank)[:MOST])


def thumbnails(viewing: PhotoPass, found: Sequence[TopPositions]) -> dict[str, Any]:
    """Return where the photos that are shown whole are, in JSON terms.

    The facts are `tile` (width, height), `columns` and `rows` of every sheet, the last one too, `photos` (their
    numbers, tile after tile) and `sheets`, the files.
    """
    photos = whole(found)
    files = [photo_sheet(page) for page in range(-(-len(photos) // ACROSS**2))]
    return {"tile": list(album_tile(viewing)), "columns": ACROSS, "rows": ACROSS, "photos": photos, "sheets": files}


def photo_sheet(page: int) -> str:
    """Return the file of one of the sheets of whole photos."""
    return f"photos_{page}.webp"


def album_tile(viewing: PhotoPass) -> tuple[int, int]:
    """Return width and height of a whole photo's tile."""
    height, width = viewing.size
    return tile_size((width, height), PHOTO)


def sheets(viewing: PhotoPass, found: Sequence[TopPositions]) -> Iterator[tuple[str, bytes]]:
    """Yield the sheets of all layers and of the photos, by name. Only the strongest photos are read again.

    Each is read once for as many layers as fit the memory together, which mostly is all of them.
    """
    photos = whole(found)
    for layers in layer_groups([len(one.photos) * one.photos.shape[1] for one in found]):
        yield from filled(viewing, {number: found[number] for number in layers}, photos)
        photos = []  # they were all seen the first time


def layer_groups(tiles: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of layers of so many tiles, as many at once as fit the memory, and at least one."""
    held: list[int] = []
    for number, count in enumerate(tiles):
        if held and (sum(tiles[one] for one in held) + count) * TILE * TILE * 3 > AT_ONCE:
            yield held
            held = []
        held.append(number)
    if held:
        yield held


def filled(viewing: PhotoPass, found: Mapping[int, TopPositions], photos: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Yield the sheets of some layers, by name, and those of photos (ascending); of these one at a time is filled."""
    pages, by_photo = blank(found), entries(found)
    places = {photo: place for place, photo in enumerate(photos)}
    width, height = album_tile(viewing)
    for photo, image in seen(viewing, sorted({*by_photo, *photos})):
        for name, corner, tile in tiles(viewing, image, by_photo.get(photo, ())):
            pages[name].paste(tile, corner)
        if photo in places:
            number, spot = divmod(places[photo], ACROSS**2)
            if spot == 0:
                album = Image.new("RGB", (ACROSS * width, ACROSS * height), EMPTY)
            album.paste(thumbnail(image, (width, height)), (spot % ACROSS * width, spot // ACROSS * height))
            if spot == ACROSS**2 - 1 or photo == photos[-1]:
                yield photo_sheet(number), webp(album, QUALITY, EFFORT)
    yield from ((name, webp(pages.pop(name), QUALITY, EFFORT)) for name in list(pages))


def blank(found: Mapping[int, TopPositions]) -> dict[str, Picture]:
    """Return the sheets of some layers, by name, without a crop yet."""
    pages: dict[str, Picture] = {}
    for number, one in found.items():
        for page, name in enumerate(names(number, len(one.photos))):
            rows = min(ROWS, len(one.photos) - page * ROWS)
            pages[name] = Image.new("RGB", (one.photos.shape[1] * TILE, rows * TILE), EMPTY)
    return pages


def seen(viewing: PhotoPass, photos: Sequence[int]) -> Iterator[tuple[int, Picture]]:
    """Yield photos by number as the network saw them."""
    for photo, shown in viewing.photos.each(photos, lambda one: (one, viewing.show(one))):
        if isinstance(shown, RefusedPhoto):
            raise PhotoRefused(f"{shown.reason}; it could be read a moment ago")
        yield photo, as_seen(shown.image)


class CropTile(NamedTuple):
    """One tile: of which layer, channel and rank, and the place of the peak."""

    layer: int
    channel: int
    rank: int
    place: tuple[int, int]


def entries(found: Mapping[int, TopPositions]) -> dict[int, list[CropTile]]:
    """Return the tiles to be made of each photo, by ascending number."""
    by_photo: dict[int, list[CropTile]] = {}
    for number, one in found.items():
        there = (one.photos != NONE).nonzero()
        rows = zip(
            there.tolist(), one.photos[tuple(there.T)].tolist(), one.places[tuple(there.T)].tolist(), strict=True
        )
        for (channel, rank), photo, (row, column) in rows:
            by_photo.setdefault(photo, []).append(CropTile(number, channel, rank, (row, column)))
    return dict(sorted(by_photo.items()))


def tiles(
    viewing: PhotoPass, image: Picture, wanted: Sequence[CropTile]
) -> Iterator[tuple[str, tuple[int, int], Picture]]:
    """Yield for each tile of a photo its sheet, its corner there, and its picture."""
    cut = cache(lambda part: crop(image, part))  # many channels look at the same part
    for one in wanted:
        page, row = divmod(one.channel, ROWS)
        part = window(viewing.layers[one.layer], one.place, viewing.size)
        yield name_of(one.layer, page), (one.rank * TILE, row * TILE), cut(part)


def as_seen(image: Tensor) -> Picture:
    """Return an image (1, c, h, w) as the network saw it: grey the mean of its channels where these are not three."""
    shown = image[0] if image.shape[1] == 3 else image[0].mean(0, keepdim=True)
    return picture(shown.to(torch.float32)).convert("RGB")
