"""Sprite sheets: all pictures of a layer, small, in a few files, so that a browser loads a handful of files a layer."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from phosphene.images.display import Picture
from phosphene.images.encode import webp

TILE = 96  # pixels, the longer side of a tile at most
STRIP_TILE, STRIP_TILES = 64, 12  # the same for a strip, and how many tiles it has at most
MAX_TILES = 256  # of a sheet: a browser shows the first sheet before it has the last, and decodes several at once
MAX_SIDE = 16383  # pixels, the longest side that WebP has
QUALITY = 90


class SpriteSheet(NamedTuple):
    """One file of tiles, row by row without a gap; `facts` say where each tile is, in JSON terms."""

    name: str
    content: bytes
    facts: dict[str, Any]


def sprite_sheets(pictures: Sequence[Picture], channels: Sequence[int], most: int = MAX_TILES) -> Iterator[SpriteSheet]:
    """Yield the sheets of pictures of one size: `sheet.webp`, and if that does not hold all, `sheet_2.webp` and so on.

    The facts are `file`, `tile` (width, height), `columns` and `channels`, tile after tile.
    """
    for number, start in enumerate(range(0, len(pictures), most), 1):
        name = "sheet.webp" if number == 1 else f"sheet_{number}.webp"
        part = slice(start, start + most)
        columns = math.ceil(math.sqrt(len(pictures[part])))
        yield sprite_sheet(name, pictures[part], channels[part], columns, TILE)


def preview_strip(pictures: Sequence[Picture], channels: Sequence[int]) -> SpriteSheet:
    """Return one row of a layer's pictures, evenly spaced if there are more than `STRIP_TILES`, as `strip.webp`."""
    last, count = len(pictures) - 1, min(STRIP_TILES, len(pictures))
    indices = [round(last * column / max(1, count - 1)) for column in range(count)]
    chosen = [pictures[index] for index in indices]
    return sprite_sheet("strip.webp", chosen, [channels[index] for index in indices], count, STRIP_TILE)


def sprite_sheet(
    name: str, pictures: Sequence[Picture], channels: Sequence[int], columns: int, side: int
) -> SpriteSheet:
    """Return pictures of one size as a sheet of tiles of at most `side` pixels."""
    size = tile_size(pictures[0].size, side)
    content = webp(tile([thumbnail(picture, size) for picture in pictures], columns), QUALITY)
    return SpriteSheet(name, content, {"file": name, "tile": [*size], "columns": columns, "channels": [*channels]})


def tile_size(size: tuple[int, int], side: int = TILE) -> tuple[int, int]:
    """Return the width and height of the tile of a picture; a smaller picture keeps its size."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def thumbnail(image: Picture, size: tuple[int, int]) -> Picture:
    """Return a picture as a tile, smoothed if it shrinks."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def tile(tiles: Sequence[Picture], columns: int) -> Picture:
    """Return tiles of one size row by row; cells that hold none are white."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), "white")
    for index, picture in enumerate(tiles):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
