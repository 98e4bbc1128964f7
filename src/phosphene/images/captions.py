"""Writing on pictures: titles, axis labels, tables and colour bars."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from phosphene.images.display import Picture, apply_colormap

PAPER, INK, GREY, SHADE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (243, 243, 243)
LETTERS = 14  # height of the text, in pixels
FONT = "fonts/ttf/DejaVuSans.ttf"


@cache
def label_font(size: int = LETTERS) -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels: matplotlib's own, which looks the same everywhere."""
    package = find_spec("matplotlib")  # half a second faster than its import, after which it would say itself where
    path = Path(str(package and package.origin)).parent / "mpl-data" / FONT
    if not path.is_file():
        from matplotlib import get_data_path

        path = Path(get_data_path()) / FONT
    return ImageFont.truetype(str(path), size)


def with_caption(image: Picture, title: str, note: str = "", letters: int = LETTERS) -> Picture:
    """Return a picture on white paper under a title and the lines of a note, which are grey."""
    lines = [(title, label_font(letters + 3), INK)] + [(text, label_font(letters), GREY) for text in note.splitlines()]
    width = max(image.width, *(math.ceil(font.getlength(text)) for text, font, _ in lines))
    border, line = 12, letters + 10
    top = border + line * len(lines) + 4
    page = Image.new("RGB", (width + 2 * border, top + image.height + border), PAPER)
    for number, (text, font, ink) in enumerate(lines):
        ImageDraw.Draw(page).text((border, border + number * line), text, ink, font)
    page.paste(image, (border, top))
    return page


def wrap_text(parts: Sequence[str], width: int, between: str = " · ", letters: int = LETTERS) -> str:
    """Return the parts of a note in lines of at most `width` pixels; a part that is wider gets a line to itself."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}{between}{part}" if lines else part
        fits = lines and label_font(letters).getlength(joined) <= width
        lines = [*lines[:-1], joined] if fits else [*lines, part]
    return "\n".join(lines)


def with_axis_labels(
    image: Picture, rows: Mapping[int, str], columns: Mapping[int, str] | None = None, letters: int = LETTERS - 3
) -> Picture:
    """Return a picture with labels left of it and above it; the keys are the pixels that labels are centred on."""
    font = label_font(letters)
    left = max((math.ceil(font.getlength(text)) + 6 for text in rows.values()), default=0)
    top = letters + 7 if columns else 0
    page = Image.new("RGB", (left + image.width, top + image.height), PAPER)
    page.paste(image, (left, top))
    draw = ImageDraw.Draw(page)
    for y, text in rows.items():
        draw.text((left - 4, top + y), text, GREY, font, anchor="rm")
    for x, text in (columns or {}).items():
        draw.text((left + x, top - 3), text, GREY, font, anchor="ms")
    return page


def index_labels(numbers: range, step: int, room: int, prefix: str = "") -> dict[int, str]:
    """Return labels for tiles that are `step` pixels apart: each 1st, 2nd, 4th … so that a label has `room` pixels."""
    stride = 2 ** max(0, math.ceil(math.log2(room / step)))
    shown = ((index, number) for index, number in enumerate(numbers) if index % stride == 0)
    return {index * step + step // 2: f"{prefix}{number}" for index, number in shown}


def text_column(heading: str, cells: Mapping[int, str], height: int) -> Picture:
    """Return a right-aligned column of text under its heading; the keys are the pixels that cells are centred on."""
    font, top = label_font(LETTERS - 3), LETTERS + 4  # as `with_axis_labels`, beside which it stands
    width = max(math.ceil(font.getlength(text)) for text in (heading, *cells.values()))
    page = Image.new("RGB", (width, top + height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((width, top - 3), heading, GREY, font, anchor="rs")
    for y, text in cells.items():
        draw.text((width, top + y), text, GREY, font, anchor="rm")
    return page


def stack_images(pictures: Sequence[Picture], down: bool = False, gap: int = 16) -> Picture:
    """Return pictures side by side, their tops aligned, or one below the other, on white paper."""
    starts = list(accumulate((picture.size[down] + gap for picture in pictures), initial=0))
    length, across = starts[-1] - gap, max(picture.size[not down] for picture in pictures)
    page = Image.new("RGB", (across, length) if down else (length, across), PAPER)
    for picture, start in zip(pictures, starts, strict=False):
        page.paste(picture, (0, start) if down else (start, 0))
    return page


def colour_bar(low: float, high: float, colours: str, height: int) -> Picture:
    """Return a bar of a colour map, upright, with the numbers at both ends and in the middle."""
    levels = torch.linspace(255, 0, height).round().to(torch.uint8)
    bar = Image.fromarray(apply_colormap(levels[:, None].expand(-1, 16), colours).numpy())
    font = label_font(LETTERS - 2)
    marks = ((0, high, "la"), (height // 2, (low + high) / 2, "lm"), (height - 1, low, "ld"))
    texts = [(y, f"{number:.3g}", anchor) for y, number, anchor in marks]
    page = Image.new("RGB", (24 + max(math.ceil(font.getlength(text)) for _, text, _ in texts), height), PAPER)
    page.paste(bar, (0, 0))
    for y, text, anchor in texts:
        ImageDraw.Draw(page).text((22, y), text, INK, font, anchor=anchor)
    return page


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int = 0) -> Picture:
    """Return a table of text: the first two columns aligned left, the others (numbers) right."""
    font, line, space = label_font(LETTERS - 1), LETTERS + 6, 22
    lines = (headings, *rows)
    widths = [max(math.ceil(font.getlength(text)) for text in column) for column in zip(*lines, strict=True)]
    spare = max(0, width - sum(widths) - space * len(widths)) // len(widths)
    page = Image.new("RGB", (max(width, sum(widths) + (space + spare) * len(widths)), line * len(lines) + 4), PAPER)
    draw = ImageDraw.Draw(page)
    for number, cells in enumerate(lines):
        top, left = number * line, space // 2
        if number and number % 2 == 0:
            draw.rectangle((0, top, page.width, top + line - 1), fill=SHADE)
        for column, (cell, cell_width) in enumerate(zip(cells, widths, strict=True)):
            x, anchor = (left, "lm") if column < 2 else (left + cell_width + spare, "rm")
            draw.text((x, top + line // 2), cell, INK if number else GREY, font, anchor=anchor)
            left += cell_width + space + spare
    return page
