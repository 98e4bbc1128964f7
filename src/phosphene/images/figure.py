"""Pictures out of tensors: display rules, tiles, grids, and PNG bytes with metadata. PIL images throughout."""

from __future__ import annotations

import io
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from phosphene.errors import InvalidRequest, Unfinished

Picture = Image.Image
MARGIN = 5  # black pixels between the pictures of a grid (R4.2)
DEAD = (200, 60, 60)
PAPER, INK, QUIET, SHADE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (243, 243, 243)
EMPTY = (38, 38, 38)  # darker than any colour of viridis, which a blank channel must not be taken for
LETTERS = 14  # height of writing, in pixels
RATE = 25  # pictures a second of an MP4, at which every player and slide program shows it
MP4 = (  # colours by the standard for high definition, which is said in the file; sides made even
    "-vf",
    "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p",
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-movflags", "+faststart"),
)
CODECS = (("-c:v", "libx264", "-crf", "14"), ("-q:v", "2"))  # the second: what an ffmpeg without libx264 has
REST = 1500  # milliseconds that the last frame of a film stays
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


def standardise_map(maps: Tensor) -> Tensor:
    """Return each map (n, h, w) minus its mean, over its deviation, × 64, + 128, in whole 0..255 (R4.1); flat: 128."""
    deviation = maps.std((1, 2), correction=0, keepdim=True)
    levels = (maps - maps.mean((1, 2), keepdim=True)) / torch.where(deviation > 0, deviation, 1) * 64 + 128
    return levels.nan_to_num(128).clamp(0, 255).floor()


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


def painted(levels: Tensor, colours: str = "viridis") -> Tensor:
    """Return levels 0..255 (…), uint8, as colours (…, 3), uint8, of a colour map of matplotlib's; `gray` is exact."""
    if colours == "gray":  # whose table in matplotlib is one too dark at some levels, for it rounds down
        return levels.cpu()[..., None].repeat_interleave(3, -1)
    from matplotlib import colormaps  # as above

    table = colormaps[colours](np.linspace(0, 1, 256), bytes=True)[:, :3]
    return torch.from_numpy(np.take(table, levels.cpu().numpy(), axis=0))


def crossed(tile: Picture) -> Picture:
    """Return a darkened tile with a red cross: the sign for a filter that never fired."""
    marked = Image.blend(tile.convert("RGB"), Image.new("RGB", tile.size), 0.7)
    width, height = tile.size
    draw = ImageDraw.Draw(marked)
    thickness = max(1, min(width, height) // 32)
    draw.line([(0, 0), (width - 1, height - 1)], fill=DEAD, width=thickness)
    draw.line([(0, height - 1), (width - 1, 0)], fill=DEAD, width=thickness)
    return marked


def resized(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (n, h, w) at a size: a side that shrinks by averaging areas, one that grows by repeating."""
    height, width = (min(pair) for pair in zip(levels.shape[1:], size, strict=True))
    small = levels if (height, width) == levels.shape[1:] else F.adaptive_avg_pool2d(levels, (height, width))
    return F.interpolate(small[None], size, mode="nearest-exact")[0]


def blank(height: int, width: int) -> Picture:
    """Return a dark tile with a small ring: the sign for a channel that shows nothing."""
    tile = Image.new("RGB", (width, height), EMPTY)
    radius = max(1, min(width, height) // 8)
    ring = [(side - 1) / 2 + sign * radius for sign in (-1, 1) for side in (width, height)]
    ImageDraw.Draw(tile).ellipse(ring, outline=QUIET, width=max(1, radius // 3))
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


@cache
def lettering(size: int = LETTERS) -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels: matplotlib's own, which looks the same everywhere."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def captioned(image: Picture, title: str, note: str = "") -> Picture:
    """Return a picture on white paper under a title, and below that the lines of a note, which are quieter."""
    lines = [(title, lettering(LETTERS + 3), INK)] + [(text, lettering(), QUIET) for text in note.splitlines()]
    width = max(image.width, *(math.ceil(font.getlength(text)) for text, font, _ in lines))
    border, line = 12, LETTERS + 10
    top = border + line * len(lines) + 4
    page = Image.new("RGB", (width + 2 * border, top + image.height + border), PAPER)
    for number, (text, font, ink) in enumerate(lines):
        ImageDraw.Draw(page).text((border, border + number * line), text, ink, font)
    page.paste(image, (border, top))
    return page


def flowed(parts: Sequence[str], width: int, between: str = " · ") -> str:
    """Return the parts of a note in lines of at most `width` pixels, where no part is wider by itself."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]}{between}{part}" if lines else part
        fits = lines and lettering().getlength(longer) <= width
        lines = [*lines[:-1], longer] if fits else [*lines, part]
    return "\n".join(lines)


def ruled(image: Picture, rows: Mapping[int, str], columns: Mapping[int, str] | None = None) -> Picture:
    """Return a picture with labels left of it and above it; the keys are the pixels that labels are centred on."""
    font = lettering(LETTERS - 3)
    left = max((math.ceil(font.getlength(text)) + 6 for text in rows.values()), default=0)
    top = LETTERS + 4 if columns else 0
    page = Image.new("RGB", (left + image.width, top + image.height), PAPER)
    page.paste(image, (left, top))
    draw = ImageDraw.Draw(page)
    for y, text in rows.items():
        draw.text((left - 4, top + y), text, QUIET, font, anchor="rm")
    for x, text in (columns or {}).items():
        draw.text((left + x, top - 3), text, QUIET, font, anchor="ms")
    return page


def column(heading: str, cells: Mapping[int, str], height: int) -> Picture:
    """Return a column of text, to the right, under its heading; the keys are the pixels that cells are centred on."""
    font, top = lettering(LETTERS - 3), LETTERS + 4  # that of `ruled`, beside which it stands
    width = max(math.ceil(font.getlength(text)) for text in (heading, *cells.values()))
    page = Image.new("RGB", (width, top + height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((width, top - 3), heading, QUIET, font, anchor="rs")
    for y, text in cells.items():
        draw.text((width, top + y), text, QUIET, font, anchor="rm")
    return page


def joined(pictures: Sequence[Picture], down: bool = False, gap: int = 16) -> Picture:
    """Return pictures side by side, their tops aligned, or one below the other, on white paper."""
    ends = list(accumulate((one.size[down] + gap for one in pictures), initial=0))
    length, across = ends[-1] - gap, max(one.size[not down] for one in pictures)
    page = Image.new("RGB", (across, length) if down else (length, across), PAPER)
    for one, start in zip(pictures, ends, strict=False):
        page.paste(one, (0, start) if down else (start, 0))
    return page


def colour_bar(low: float, high: float, colours: str, height: int) -> Picture:
    """Return a bar of a colour map, upright, with the numbers at both ends and in the middle."""
    levels = torch.linspace(255, 0, height).round().to(torch.uint8)
    bar = Image.fromarray(painted(levels[:, None].expand(-1, 16), colours).numpy())
    font = lettering(LETTERS - 2)
    marks = ((0, high, "la"), (height // 2, (low + high) / 2, "lm"), (height - 1, low, "ld"))
    texts = [(y, f"{number:.3g}", anchor) for y, number, anchor in marks]
    page = Image.new("RGB", (24 + max(math.ceil(font.getlength(text)) for _, text, _ in texts), height), PAPER)
    page.paste(bar, (0, 0))
    for y, text, anchor in texts:
        ImageDraw.Draw(page).text((22, y), text, INK, font, anchor=anchor)
    return page


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int = 0) -> Picture:
    """Return a table of text: the first two columns to the left, the others (numbers) to the right."""
    font, line, space = lettering(LETTERS - 1), LETTERS + 6, 22
    shown = (headings, *rows)
    wide = [max(math.ceil(font.getlength(row[column])) for row in shown) for column in range(len(headings))]
    spare = max(0, width - sum(wide) - space * len(wide)) // len(wide)
    page = Image.new("RGB", (max(width, sum(wide) + (space + spare) * len(wide)), line * len(shown) + 4), PAPER)
    draw = ImageDraw.Draw(page)
    for number, row in enumerate(shown):
        top, right = number * line, space // 2
        if number and number % 2 == 0:
            draw.rectangle((0, top, page.width, top + line - 1), fill=SHADE)
        for column, (cell, one) in enumerate(zip(row, wide, strict=True)):
            place, anchor = (right, "lm") if column < 2 else (right + one + spare, "rm")
            draw.text((place, top + line // 2), cell, INK if number else QUIET, font, anchor=anchor)
            right += one + space + spare
    return page


def opened(content: bytes) -> Picture:
    """Return the picture of an image file's bytes, read whole."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return image


def webp(image: Picture, quality: int, effort: int = 4) -> bytes:
    """Return a picture as WebP bytes; equal input, equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=effort)
    return buffer.getvalue()


def png(image: Picture, metadata: Mapping[str, Any], effort: int = 6) -> bytes:
    """Return an image as PNG bytes, packed with `effort` 1 to 9, that carry the metadata; equal input, equal bytes."""
    info = PngInfo()
    info.add_itxt(METADATA, json.dumps(metadata, sort_keys=True, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=effort)
    return buffer.getvalue()


def gif(frames: Sequence[Picture], milliseconds: int = 80) -> bytes:
    """Return frames as the bytes of a GIF that loops for ever and rests on the last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [REST]
    size = frames[-1].size
    scaled = [frame if frame.size == size else frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    scaled[0].save(buffer, "GIF", save_all=True, append_images=scaled[1:], duration=durations, loop=0)
    return buffer.getvalue()


def same_size(frames: Sequence[Picture]) -> Iterator[Picture]:
    """Yield frames on white paper of one size."""
    size = (max(one.width for one in frames), max(one.height for one in frames))
    for one in frames:
        page = one if one.size == size else Image.new("RGB", size, PAPER)
        if page is not one:
            page.paste(one, (0, 0))
        yield page


def mp4(frames: Sequence[Picture], milliseconds: int) -> bytes:
    """Return frames of one size as the bytes of an MP4 of 25 pictures a second, each repeated as long as it stays.

    Raises:
        Unfinished: ffmpeg failed.
    """
    width, height = frames[0].size
    given = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(RATE), "-i", "-")
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "film.mp4")
        for codec in CODECS:
            command = ["ffmpeg", "-v", "error", "-y", *given, *MP4, *codec, str(target)]
            with tempfile.TemporaryFile() as errors:
                with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors) as process:
                    assert process.stdin is not None
                    try:
                        for index, one in enumerate(frames):
                            stays = REST if index == len(frames) - 1 else milliseconds
                            for _ in range(stays * RATE // 1000):
                                process.stdin.write(one.tobytes())
                        process.stdin.close()
                    except BrokenPipeError:
                        pass  # it ended early, and says why
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
            if process.returncode == 0:
                return target.read_bytes()
    reason = said.splitlines()[-1] if said else "no reason given"
    raise Unfinished(f"ffmpeg could not make the film ({reason}); a .gif needs no ffmpeg")
