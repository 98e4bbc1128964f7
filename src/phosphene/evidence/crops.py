"""Sheets of crops: what each channel's strongest photos show where the channel answers, and sheets of these photos.

One row per channel, the strongest photo first. A tile is the receptive field of the peak, as the network saw the photo
there; the part of it outside the photo is grey. If the field is unknown or holds the photo, the tile is the photo.
The photos whole, as the network saw them, are small tiles in the order of their numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from phosphene.errors import PhotoRefused
from phosphene.evidence.photo_pass import PhotoPass, RefusedPhoto
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.images.display import Picture
from phosphene.images.encode import webp
from phosphene.images.grid import EMPTY, picture
from phosphene.images.sprites import thumbnail, tile_size
from phosphene.network.layers import Layer
from phosphene.progress import Bar

TILE = 64  # pixels of a tile's longer side
ROWS = 128  # channels of a sheet, which keeps it below WebP's limit of 16,383 px
QUALITY, EFFORT = 80, 2  # of WebP: twice as quick as at effort 4, for a twentieth more bytes
OPEN_BYTES = 2**29  # of the sheets that are filled at the same time
PHOTO_TILE, ACROSS = 112, 5  # pixels of a whole photo's longer side at most, and photos along each side of a sheet
MAX_WHOLE = 20_000  # photos that are shown whole, about 80 MB
OUTSIDE = (128, 128, 128)  # about what a network sees beyond the border, where it pads with zeros
COARSE = 16  # pixels up to which a field is enlarged as squares; a larger one is smoothed


class Window(NamedTuple):
    """A part of an image, in its pixels; it may go beyond the border."""

    top: int
    left: int
    height: int
    width: int


class TopPositions(NamedTuple):
    """The strongest photos of a layer's channels, (c, k), and the positions (c, k, 2) of their peaks."""

    photos: Tensor
    positions: Tensor


def window(layer: Layer, position: tuple[int, int], size: tuple[int, int]) -> Window:
    """Return which part of an image of a size (h, w) a position (row, column) of a layer's map sees."""
    field = layer.receptive_field
    if field is None or (field.size[0] >= size[0] and field.size[1] >= size[1]):
        return Window(0, 0, *size)
    axes = zip(position, field.stride, field.padding, strict=True)
    top, left = (index * stride - padding for index, stride, padding in axes)
    return Window(top, left, *field.size)


def crop(image: Picture, part: Window) -> Picture:
    """Return a part of an image as a tile of `TILE` pixels, grey outside the image."""
    longer = max(part.width, part.height)
    width, height = (max(1, round(side * TILE / longer)) for side in (part.width, part.height))
    resampling = Image.Resampling.NEAREST if longer <= COARSE else Image.Resampling.BICUBIC
    box = part.left, part.top, part.left + part.width, part.top + part.height
    if box[0] < 0 or box[1] < 0 or box[2] > image.width or box[3] > image.height:
        padded = Image.new("RGB", (part.width, part.height), OUTSIDE)
        padded.paste(image, (-part.left, -part.top))
        resized = padded.resize((width, height), resampling)
    else:
        resized = image.resize((width, height), resampling, box)
    if resized.size == (TILE, TILE):
        return resized
    tile = Image.new("RGB", (TILE, TILE), EMPTY)
    tile.paste(resized, ((TILE - width) // 2, (TILE - height) // 2))
    return tile


def sheet_names(layer: int, channels: int) -> list[str]:
    """Return the files of a layer's sheets; the n-th holds the channels from n · ROWS on."""
    return [sheet_name(layer, page) for page in range(-(-channels // ROWS))]


def sheet_name(layer: int, page: int) -> str:
    return f"crops_{layer}_{page}.webp"


def photo_sheet_name(page: int) -> str:
    return f"photos_{page}.webp"


def photo_tile_size(photo_pass: PhotoPass) -> tuple[int, int]:
    """Return width and height of a whole photo's tile."""
    height, width = photo_pass.size
    return tile_size((width, height), PHOTO_TILE)


def whole_photos(top: Sequence[TopPositions]) -> list[int]:
    """Return the numbers of the photos shown whole, ascending: all of the strongest, if not more than `MAX_WHOLE`.

    Else these are the strongest of a channel first, then those that come second somewhere, and so on.
    """
    by_rank = dict.fromkeys(torch.cat([layer.photos for layer in top]).T.flatten().tolist())
    by_rank.pop(NO_PHOTO, None)
    return sorted(list(by_rank)[:MAX_WHOLE])


def thumbnails(photo_pass: PhotoPass, top: Sequence[TopPositions]) -> dict[str, Any]:
    """Return the positions of the photos shown whole, in JSON terms.

    These are `tile` (width, height), `columns` and `rows` of every sheet, the last one too, `photos` (their numbers,
    tile after tile) and `sheets`, the files.
    """
    photos, tile = whole_photos(top), list(photo_tile_size(photo_pass))
    files = [photo_sheet_name(page) for page in range(-(-len(photos) // ACROSS**2))]
    return {"tile": tile, "columns": ACROSS, "rows": ACROSS, "photos": photos, "sheets": files}


def sheets(photo_pass: PhotoPass, top: Sequence[TopPositions], bar: Bar) -> Iterator[tuple[str, bytes]]:
    """Yield the sheets of all layers and of the photos, by name. Only the strongest photos are read again.

    Each is read once for as many layers as fit the memory together, usually for all of them. The bar counts them.
    """
    photos = whole_photos(top)
    for layers in layer_groups([layer.photos.numel() for layer in top]):
        yield from fill_sheets(photo_pass, {layer: top[layer] for layer in layers}, photos, bar)
        photos = []  # they were all shown the first time


def layer_groups(tiles: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of layers of so many tiles, as many at once as fit the memory, and at least one."""
    group: list[int] = []
    for layer, count in enumerate(tiles):
        if group and (sum(tiles[member] for member in group) + count) * TILE * TILE * 3 > OPEN_BYTES:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def fill_sheets(
    photo_pass: PhotoPass, top: Mapping[int, TopPositions], photos: Sequence[int], bar: Bar
) -> Iterator[tuple[str, bytes]]:
    """Yield the sheets of layers, by name, and those of photos (ascending); of the latter one at a time is filled."""
    pages, tiles = blank_sheets(top), tiles_by_photo(top)
    indices = {photo: index for index, photo in enumerate(photos)}
    width, height = photo_tile_size(photo_pass)
    shown = sorted({*tiles, *photos})
    bar.total += len(shown)
    for photo, image in network_views(photo_pass, shown):
        bar.done += 1
        for name, corner, tile in cut_tiles(photo_pass, image, tiles.get(photo, ())):
            pages[name].paste(tile, corner)
        if photo in indices:
            page, cell = divmod(indices[photo], ACROSS**2)
            if cell == 0:
                sheet = Image.new("RGB", (ACROSS * width, ACROSS * height), EMPTY)
            sheet.paste(thumbnail(image, (width, height)), (cell % ACROSS * width, cell // ACROSS * height))
            if cell == ACROSS**2 - 1 or photo == photos[-1]:
                yield photo_sheet_name(page), webp(sheet, QUALITY, EFFORT)
    yield from ((name, webp(pages.pop(name), QUALITY, EFFORT)) for name in list(pages))


def blank_sheets(top: Mapping[int, TopPositions]) -> dict[str, Picture]:
    """Return the empty sheets of layers, by name."""
    pages: dict[str, Picture] = {}
    for layer, (photos, _) in top.items():
        for page, name in enumerate(sheet_names(layer, len(photos))):
            rows = min(ROWS, len(photos) - page * ROWS)
            pages[name] = Image.new("RGB", (photos.shape[1] * TILE, rows * TILE), EMPTY)
    return pages


def network_views(photo_pass: PhotoPass, photos: Sequence[int]) -> Iterator[tuple[int, Picture]]:
    """Yield photos by number, each as the network saw it."""
    for photo in photo_pass.photos.map_in_order(photos, photo_pass.load):
        if isinstance(photo, RefusedPhoto):
            raise PhotoRefused(f"{photo.reason}; it could be read a moment ago")
        yield photo.photo, to_picture(photo.image)


class CropTile(NamedTuple):
    """One tile: its layer, channel and rank, and the position of the peak."""

    layer: int
    channel: int
    rank: int
    position: tuple[int, int]


def tiles_by_photo(top: Mapping[int, TopPositions]) -> dict[int, list[CropTile]]:
    """Return the tiles to cut out of each photo, by ascending number."""
    tiles: dict[int, list[CropTile]] = {}
    for layer, (photos, positions) in top.items():
        channels, ranks = (photos != NO_PHOTO).nonzero(as_tuple=True)
        columns = channels, ranks, photos[channels, ranks], positions[channels, ranks]
        for channel, rank, photo, (row, column) in zip(*(values.tolist() for values in columns), strict=True):
            tiles.setdefault(photo, []).append(CropTile(layer, channel, rank, (row, column)))
    return dict(sorted(tiles.items()))


def cut_tiles(
    photo_pass: PhotoPass, image: Picture, tiles: Sequence[CropTile]
) -> Iterator[tuple[str, tuple[int, int], Picture]]:
    """Yield for each tile of a photo its sheet, its corner there, and its picture."""
    cut = cache(lambda part: crop(image, part))  # many channels look at the same part
    for tile in tiles:
        page, row = divmod(tile.channel, ROWS)
        part = window(photo_pass.layers[tile.layer], tile.position, photo_pass.size)
        yield sheet_name(tile.layer, page), (tile.rank * TILE, row * TILE), cut(part)


def to_picture(image: Tensor) -> Picture:
    """Return an image (1, c, h, w) as a picture: grey, the mean of its channels, if these are not three."""
    channels = image[0] if image.shape[1] == 3 else image[0].mean(0, keepdim=True)
    return picture(channels.to(torch.float32)).convert("RGB")
