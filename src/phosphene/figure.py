"""Pictures out of tensors: display rules, tiles, grids, and PNG bytes with metadata. PIL images throughout."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from phosphene.errors import InvalidRequest

Picture = Image.Image
MARGIN = 5  # black pixels between the pictures of a grid (R4.2)
DEAD = (200, 60, 60)
METADATA = "phosphene"  # the PNG text entry that holds the metadata as JSON


def clip(images: Tensor) -> Tensor:
    """Return the images (n, c, h, w) held inside [0, 1]."""
    return images.clamp(0, 1)


def stretch(images: Tensor) -> Tensor:
    """Return each image stretched from its own minimum..maximum to 0..1 (R1, step 4); a flat one becomes 0."""
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    span = (high - low).clamp(min=torch.finfo(images.dtype).tiny)
    return (images - low.view(-1, 1, 1, 1)) / span.view(-1, 1, 1, 1)


def standardise(images: Tensor) -> Tensor:
    """Return each image minus its mean, over its standard deviation + 1e-5, × 0.1, + 0.5, clipped (R4.2, on 0..255)."""
    counted = images * 255
    mean = counted.flatten(1).mean(1).view(-1, 1, 1, 1)
    deviation = counted.flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return ((counted - mean) / (deviation + 1e-5) * 0.1 + 0.5).clamp(0, 1)


DISPLAYS = {"clip": clip, "stretch": stretch, "standardise": standardise}


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8 0..255, rounded to the nearest."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def picture(image: Tensor) -> Picture:
    """Return one image (c, h, w), in [0, 1] or uint8, as a PIL image: grey for one channel, RGB for three.

    Any other number of channels becomes a grey tile a channel, in a near-square block.
    """
    shown = image if image.dtype == torch.uint8 else to_bytes(image)
    if shown.shape[0] == 3:
        return Image.fromarray(shown.permute(1, 2, 0).contiguous().cpu().numpy())
    bands = [Image.fromarray(band.contiguous().cpu().numpy()) for band in shown]
    return bands[0] if len(bands) == 1 else grid(bands, margin=0)


def coloured(values: Tensor, colours: str = "viridis") -> Picture:
    """Return values (h, w) in [0, 1] as an RGB picture in a colour map of matplotlib's; what is outside is clipped."""
    from matplotlib import colormaps  # a fifth of a second, which a render need not wait for

    painted = colormaps[colours](values.double().clamp(0, 1).cpu().numpy(), bytes=True)
    return Image.fromarray(painted[..., :3].copy())


def crossed(tile: Picture) -> Picture:
    """Return a darkened tile with a red cross: the sign for a filter that never fired."""
    marked = Image.blend(tile.convert("RGB"), Image.new("RGB", tile.size), 0.7)
    width, height = tile.size
    draw = ImageDraw.Draw(marked)
    thickness = max(1, min(width, height) // 32)
    draw.line([(0, 0), (width - 1, height - 1)], fill=DEAD, width=thickness)
    draw.line([(0, height - 1), (width - 1, 0)], fill=DEAD, width=thickness)
    return marked


def grid(tiles: Sequence[Picture], columns: int | None = None, margin: int = MARGIN) -> Picture:
    """Return the tiles row by row, with `margin` black pixels between them.

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
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (column * (width + margin), row * (height + margin)))
    return sheet


def png(image: Picture, metadata: Mapping[str, Any]) -> bytes:
    """Return an image as PNG bytes that carry the metadata as JSON; equal input gives equal bytes."""
    info = PngInfo()
    info.add_itxt(METADATA, json.dumps(metadata, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def gif(frames: Sequence[Picture], milliseconds: int = 80) -> bytes:
    """Return frames as the bytes of a GIF that loops for ever and rests on the last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    size = frames[-1].size
    scaled = [frame if frame.size == size else frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    scaled[0].save(buffer, "GIF", save_all=True, append_images=scaled[1:], duration=durations, loop=0)
    return buffer.getvalue()
