"""Writing on pictures: titles, axis labels, tables and colour bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from phosphene.images.display import Picture, apply_colormap

PAPER, INK, QUIET, SHADE = (255, 255, 255), (25, 25, 25), (110, 110, 110), (243, 243, 243)
LETTERS = 14  # height of writing, in pixels


@cache
def lettering(size: int = LETTERS) -> ImageFont.FreeTypeFont:
    """Return a font of a size in pixels: matplotlib's own, which looks the same everywhere."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def with_caption(image: Picture, title: str, note: str = "") -> Picture:
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


def wrap_text(parts: Sequence[str], width: int, between: str = " · ") -> str:
    """Return the parts of a note in lines of at most `width` pixels, where no part is wider by itself."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]}{between}{part}" if lines else part
        fits = lines and lettering().getlength(longer) <= width
        lines = [*lines[:-1], longer] if fits else [*lines, part]
    return "\n".join(lines)


def with_axis_labels(image: Picture, rows: Mapping[int, str], columns: Mapping[int, str] | None = None) -> Picture:
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


def stack_images(pictures: Sequence[Picture], down: bool = False, gap: int = 16) -> Picture:
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
    bar = Image.fromarray(apply_colormap(levels[:, None].expand(-1, 16), colours).numpy())
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
