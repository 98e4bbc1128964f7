"""Sprite sheets: all pictures of a layer, small, in few files, so that browsing loads a handful of files a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from phosphene.images.display import Picture
from phosphene.images.encode import webp

TILE = 96  # pixels, the longer side of a tile at most
SMALL, ALONG = 64, 12  # the same of a strip, and its tiles at most
MOST = 256  # tiles of a sheet: a browser shows the first before it has the last, and decodes several at once
SIDE = 16383  # pixels, the longest side that WebP has
QUALITY = 90


class SpriteSheet(NamedTuple):
    """One file of tiles, row by row without a gap; `facts` say where each tile is, in JSON terms."""

    name: str
    content: bytes
    facts: dict[str, Any]


def sprite_sheets(pictures: Sequence[Picture], channels: Sequence[int], most: int = MOST) -> Iterator[SpriteSheet]:
    """Yield the sheets of pictures of one size: `sheet.webp`, and where one does not hold all `sheet_2.webp` and so on.

    The facts are `file`, `tile` (width, height), `columns` and `channels`, tile after tile.
    """
    size = tile_size(pictures[0].size)
    for number, start in enumerate(range(0, len(pictures), most), 1):
        some = pictures[start : start + most]
        columns = math.ceil(math.sqrt(len(some)))
        name = "sheet.webp" if number == 1 else f"sheet_{number}.webp"
        shown = {"file": name, "tile": list(size), "columns": columns, "channels": list(channels[start : start + most])}
        yield SpriteSheet(name, webp(tile([thumbnail(one, size) for one in some], columns), QUALITY), shown)


def preview_strip(pictures: Sequence[Picture], channels: Sequence[int]) -> SpriteSheet:
    """Return one row of a layer's pictures, evenly spread where there are more than `ALONG`, as `strip.webp`."""
    last, count = len(pictures) - 1, min(ALONG, len(pictures))
    shown = [round(last * place / max(1, count - 1)) for place in range(count)]
    size = tile_size(pictures[0].size, SMALL)
    content = webp(tile([thumbnail(pictures[index], size) for index in shown], count), QUALITY)
    spread = [channels[index] for index in shown]
    facts = {"file": "strip.webp", "tile": list(size), "columns": count, "channels": spread}
    return SpriteSheet("strip.webp", content, facts)


def tile_size(size: tuple[int, int], side: int = TILE) -> tuple[int, int]:
    """Return the width and height of the tile of a picture; one that is smaller stays as it is."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def thumbnail(image: Picture, size: tuple[int, int]) -> Picture:
    """Return a picture as a tile, smoothed as it shrinks."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def tile(tiles: Sequence[Picture], columns: int) -> Picture:
    """Return tiles of one size row by row."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet
