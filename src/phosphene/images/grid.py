"""One image tensor as a picture, tiles for dead filters and blank channels, and mosaics and grids of pictures."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from phosphene.errors import InvalidRequest
from phosphene.images.display import Picture, to_bytes

RING = (110, 110, 110)
MARGIN = 5  # black pixels between the pictures of a grid (R4.2)
DEAD = (200, 60, 60)
UNUSED = 243  # the level of a cell that holds no picture
EMPTY = (38, 38, 38)  # darker than any colour of viridis, so that a blank channel is not taken for a map


def picture(image: Tensor) -> Picture:
    """Return one image (c, h, w), in [0, 1] or uint8, as a PIL image: grey for one channel, RGB for three.

    Any other number of channels becomes a grey tile for each channel, in a near-square block.
    """
    levels = image if image.dtype == torch.uint8 else to_bytes(image)
    if levels.shape[0] == 3:
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())
    bands = [Image.fromarray(band.contiguous().cpu().numpy()) for band in levels]
    return bands[0] if len(bands) == 1 else grid(bands, margin=0)


def cross_out(tile: Picture) -> Picture:
    """Return a darkened tile with a red cross: the sign for a filter that never fired."""
    marked = Image.blend(tile.convert("RGB"), Image.new("RGB", tile.size), 0.7)
    width, height = tile.size
    draw = ImageDraw.Draw(marked)
    thickness = max(1, min(width, height) // 32)
    draw.line([(0, 0), (width - 1, height - 1)], fill=DEAD, width=thickness)
    draw.line([(0, height - 1), (width - 1, 0)], fill=DEAD, width=thickness)
    return marked


def blank_tile(height: int, width: int) -> Picture:
    """Return a dark tile with a small ring: the sign for a channel that shows nothing."""
    tile = Image.new("RGB", (width, height), EMPTY)
    radius = max(1, min(width, height) // 8)
    ring = [(side - 1) / 2 + sign * radius for sign in (-1, 1) for side in (width, height)]
    ImageDraw.Draw(tile).ellipse(ring, outline=RING, width=max(1, radius // 3))
    return tile


def mosaic(tiles: Tensor, columns: int, gap: int = 1, between: int = 255) -> Picture:
    """Return many small tiles (n, h, w, 3), uint8, row by row with `gap` pixels of the grey `between` them."""
    count, height, width = tiles.shape[:3]
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * columns, height + gap, width + gap, 3), between, dtype=torch.uint8)
    sheet[:count, :height, :width] = tiles
    sheet = sheet.view(rows, columns, height + gap, width + gap, 3).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return Image.fromarray(sheet[: len(sheet) - gap, : sheet.shape[1] - gap].contiguous().numpy())


def grid(tiles: Sequence[Picture], columns: int | None = None, margin: int = MARGIN) -> Picture:
    """Return the tiles row by row, with `margin` black pixels between them; cells that hold none are light.

    `columns` is by default the side of the smallest square that holds all: 3 for six (R1), 8 for sixty-four (R4.2).

    Raises:
        InvalidRequest: there are no tiles, or fewer than one column.
    """
    columns = math.ceil(math.sqrt(len(tiles))) if columns is None else columns
    if not tiles or columns < 1:
        raise InvalidRequest(f"a grid needs pictures and columns, not {len(tiles)} pictures in {columns} columns")
    rows = math.ceil(len(tiles) / columns)
    width, height = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    mode = "L" if all(tile.mode == "L" for tile in tiles) else "RGB"
    size = (columns * width + (columns - 1) * margin, rows * height + (rows - 1) * margin)
    sheet = Image.new(mode, size)
    for index in range(rows * columns):
        left, top = index % columns * (width + margin), index // columns * (height + margin)
        if index < len(tiles):
            sheet.paste(tiles[index], (left, top))
        else:
            sheet.paste(UNUSED if mode == "L" else (UNUSED,) * 3, (left, top, left + width, top + height))
    return sheet
