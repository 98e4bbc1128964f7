"""The sheet of rendered pictures: numbered, under a caption, on light paper; dead and plain filters are marked."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from phosphene.errors import InvalidRequest
from phosphene.images.captions import INK, LETTERS, PAPER, label_font, with_axis_labels, with_caption, wrap_text
from phosphene.images.display import Picture
from phosphene.images.grid import cross_out

GAP, OUTLINE = 6, (190, 190, 190)  # pixels between pictures; the line around each
WIDTH, SIDES = 1024, (128, 384)  # pixels, about: of a sheet to be filled; least and most of an enlarged picture
LETTERS_ACROSS, LEAST_WIDTH = 70, 40  # letter heights in the width of a sheet, so that large ones can be projected
LISTED = 12  # numbers that a caption lists
NUMBER = re.compile("[a-z]+_([0-9]+)")  # at the beginning of a picture's name
PLURALS = {"class": "classes"}


class SheetPicture(NamedTuple):
    """A picture of a sheet; `name` is what it shows, such as `filter_12`; see `Rendered` for `dead` and `plain`."""

    image: Picture
    name: str
    dead: bool = False
    plain: bool = False


def filter_sheet(pictures: Sequence[SheetPicture], spec: Mapping[str, Any], columns: int | None = None) -> Picture:
    """Return pictures row by row under a caption; cells that hold none stay empty.

    Numbers that count up by one stand on the rows (that of the first picture) and columns (what to add to it); others
    under their pictures. Small pictures are enlarged by a whole factor, which the caption names.

    Args:
        spec: what made them, as in `Rendered`: model, layers, what these see, and the recipe.
        columns: by default near a square, with few empty cells.

    Raises:
        InvalidRequest: there are no pictures, or fewer than one column.
    """
    columns = near_square(len(pictures)) if columns is None else columns
    if not pictures or columns < 1:
        raise InvalidRequest(f"a sheet needs pictures and columns, not {len(pictures)} pictures in {columns} columns")
    columns = min(columns, len(pictures))
    largest = [max(picture.image.size[axis] for picture in pictures) for axis in (0, 1)]
    factor = enlargement(max(largest), columns)
    width, height = (side * factor for side in largest)
    letters = max(LETTERS, columns * (width + GAP) // LETTERS_ACROSS)
    tiles = [marked_tile(picture, factor, letters) for picture in pictures]
    numbers = [number_of(picture.name) for picture in pictures]
    axes = axis_labels(numbers, columns, spec.get("facets", 1))
    if axes is None:
        body = paste_tiles(tiles, columns, (width, height), numbers, letters)
    else:
        body = paste_tiles(tiles, columns, (width, height))
        body = with_axis_labels(body, centres(height, axes[0]), centres(width, axes[1]), letters)
    facts = [*what_is_shown(pictures, numbers), *how_it_was_made(pictures, spec, factor), *marks_in_words(pictures)]
    note = wrap_text(facts, max(body.width, LEAST_WIDTH * letters), letters=letters)
    return with_caption(body, title_of(spec), note, letters)


def axis_labels(numbers: Sequence[str], columns: int, facets: int) -> tuple[Sequence[str], Sequence[str]] | None:
    """Return the labels of rows and columns, None if pictures need a label each."""
    if columns == facets > 1:
        return numbers[::columns], ["", *(f"facet {column}" for column in range(1, columns))]
    if len(numbers) <= columns:
        return [], numbers if len(numbers) > 1 else []
    return (numbers[::columns], [f"+{column}" for column in range(columns)]) if counts_up(numbers) else None


def near_square(count: int) -> int:
    """Return the columns for so many pictures: 1 to 1.75 times those of a square, with the fewest empty cells.

    Above ten pictures they are even, so that numbers on rows and columns are added easily.
    """
    side = max(1, math.ceil(math.sqrt(count)))
    widest = max(side + 1, int(1.75 * math.sqrt(count)))
    choices = [columns for columns in range(side, widest + 1) if count <= 10 or columns % 2 == 0]
    return min(choices, key=lambda columns: -count % columns)


def enlargement(side: int, columns: int) -> int:
    """Return the whole factor by which pictures of `side` pixels are enlarged."""
    return max(1, round(min(max(WIDTH / columns, SIDES[0]), SIDES[1]) / side))


def marked_tile(picture: SheetPicture, factor: int, letters: int) -> Picture:
    """Return a picture enlarged, crossed out if its filter is dead, and with the word `plain` on it if it is that."""
    width, height = (side * factor for side in picture.image.size)
    tile = picture.image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if picture.dead:
        return cross_out(tile)
    if picture.plain:
        font = label_font(max(9, min(letters, width // 5)))
        left, top, right, bottom = (int(side) for side in font.getbbox("plain", anchor="ls"))
        box = (0, height - (bottom - top) - 7, right - left + 9, height - 1)
        draw = ImageDraw.Draw(tile)
        draw.rectangle(box, PAPER, INK)
        draw.text((5 - left, height - 4 - bottom), "plain", INK, font, anchor="ls")
    return tile


def paste_tiles(
    tiles: Sequence[Picture], columns: int, size: tuple[int, int], labels: Sequence[str] = (), letters: int = 0
) -> Picture:
    """Return tiles of at most a size row by row on white paper, each in a thin line, with its label, if any, below."""
    width, height, below = *size, letters + GAP if labels else 0
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP), rows * (height + below + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left, top = index % columns * (width + GAP) + GAP // 2, index // columns * (height + below + GAP) + GAP // 2
        draw.rectangle((left - 1, top - 1, left + tile.width, top + tile.height), outline=OUTLINE)
        sheet.paste(tile, (left, top))
        if labels:
            middle = left + width // 2, top + tile.height + letters + GAP // 2
            draw.text(middle, labels[index], INK, label_font(letters - 2), anchor="ms")
    return sheet


def centres(side: int, labels: Sequence[str]) -> dict[int, str]:
    """Return labels by the pixels that they are centred on, for pictures that are `side` pixels long."""
    return {index * (side + GAP) + (side + GAP) // 2: label for index, label in enumerate(labels)}


def number_of(name: str) -> str:
    """Return the number of what a picture shows, the whole name if it has none."""
    number = NUMBER.match(name)
    return number[1] if number else name


def counts_up(numbers: Sequence[str]) -> bool:
    """Return whether numbers count up by one."""
    return numbers[0].isdigit() and list(numbers) == [str(int(numbers[0]) + index) for index in range(len(numbers))]


def title_of(spec: Mapping[str, Any]) -> str:
    """Return the layer and the network."""
    return f"{', '.join(spec['layers']) or 'the output'} · {spec['model']}"


def what_is_shown(pictures: Sequence[SheetPicture], numbers: Sequence[str]) -> list[str]:
    """Return which filters or classes pictures show, nothing if they have no numbers."""
    nouns = {picture.name.rpartition("_")[0] for picture in pictures}
    noun = nouns.pop()
    if nouns or not all(number.isdigit() for number in numbers):
        return []
    if len(numbers) == 1:
        return [f"{noun} {numbers[0]}"]
    plural = PLURALS.get(noun, f"{noun}s")
    if counts_up(numbers) and len(numbers) > 2:
        return [f"{plural} {numbers[0]} to {numbers[-1]}"]
    return [f"{plural} {', '.join(numbers)}" if len(numbers) <= LISTED else f"{len(numbers)} {plural}"]


def how_it_was_made(pictures: Sequence[SheetPicture], spec: Mapping[str, Any], factor: int) -> list[str]:
    """Return what the layer sees of the image, the recipe, and the size of pictures and how much larger it is shown."""
    sees = spec["sees"][0] if len(spec["sees"]) == 1 else "unknown"
    verb, recipe = "sees" if len(pictures) == 1 else "each sees", spec["recipe"]
    words = {"whole": "the whole image", "unknown": ""}
    field = words[sees] if isinstance(sees, str) else f"{pixels(sees)} of the image"
    size = pixels(pictures[0].image.size[::-1])
    return [
        *([f"{verb} {field}"] if field else []),
        f"recipe {recipe['name']}, {len(recipe['sizes']) * recipe['steps']} steps",
        f"{size}, shown ×{factor}" if factor > 1 else size,
    ]


def pixels(sides: Sequence[int]) -> str:
    """Return a height and a width in pixels as text."""
    return f"{sides[0]}×{sides[1]} px"


def marks_in_words(pictures: Sequence[SheetPicture]) -> list[str]:
    """Return what the marks on pictures mean, and how many have each."""
    dead, plain = (sum(getattr(picture, mark) for picture in pictures) for mark in ("dead", "plain"))
    meanings = (
        (dead, "crossed out: dead, nothing made {} answer"),
        (plain, "marked plain: a flat colour excites {} as much"),
    )
    return [f"{count} {text.format('it' if count == 1 else 'them')}" for count, text in meanings if count]
