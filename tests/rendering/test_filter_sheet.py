"""The sheet of pictures: each where its number says, whole and enlarged; marks, words and empty cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from phosphene.errors import InvalidRequest
from phosphene.images import captions
from phosphene.images.grid import DEAD
from phosphene.rendering import filter_sheet as sheets
from phosphene.rendering.filter_sheet import GAP, OUTLINE, SheetPicture, enlargement, filter_sheet, near_square

SPEC = {
    "model": "net",
    "layers": ["conv"],
    "sees": [[24, 16]],
    "recipe": {"name": "fast", "sizes": [8, 16], "steps": 5},
}


class Written:
    """What a sheet is made of: its picture, the labels of its rows and columns, and its title and note."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.body, self.rows, self.columns, self.title, self.note = Image.new("RGB", (1, 1)), [""], [""], "", ""
        self.places: list[int] = []
        label, caption = captions.with_axis_labels, captions.with_caption

        def labelled(
            body: Image.Image, rows: Mapping[int, str], columns: Mapping[int, str], letters: int
        ) -> Image.Image:
            self.body, self.rows, self.columns = body, list(rows.values()), list(columns.values())
            self.places = [*rows, *columns]
            return label(body, rows, columns, letters)

        def captioned(body: Image.Image, title: str, note: str, letters: int) -> Image.Image:
            self.title, self.note = title, note.replace("\n", " · ")
            return caption(body, title, note, letters)

        monkeypatch.setattr(sheets, "with_axis_labels", labelled)
        monkeypatch.setattr(sheets, "with_caption", captioned)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    return Written(monkeypatch)


def flat(number: int, side: int = 384, **marks: bool) -> SheetPicture:
    """Return a picture whose level is its number, doubled."""
    return SheetPicture(Image.new("RGB", (side, side), (2 * number,) * 3), f"filter_{number}", **marks)


def cell(body: Image.Image, index: int, columns: int, side: int, below: int = 0) -> np.ndarray[Any, Any]:
    """Return the pixels of a cell of `side` pixels, with the line around it."""
    top, left = index // columns * (side + below + GAP), index % columns * (side + GAP)
    pixels = np.asarray(body)[top + GAP // 2 - 1 :, left + GAP // 2 - 1 :]
    return pixels[: side + 2, : side + 2]


def test_every_picture_lies_where_its_row_and_column_say(written: Written) -> None:
    filter_sheet([flat(number) for number in range(40, 53)], SPEC, columns=5)
    assert (written.rows, written.columns) == (["40", "45", "50"], ["+0", "+1", "+2", "+3", "+4"])
    assert written.places == [195, 585, 975, 195, 585, 975, 1365, 1755]  # the middles of cells of 384 + 6
    for index in range(13):
        drawn = cell(written.body, index, 5, 384)
        assert (drawn[1:-1, 1:-1] == 2 * (40 + index)).all()
        assert all((line == OUTLINE).all() for line in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]))
    assert all((cell(written.body, index, 5, 384) == 255).all() for index in (13, 14))  # empty


@pytest.mark.parametrize(
    ("numbers", "columns", "rows", "heads"),
    [
        ([3, 7, 11], 3, [], ["3", "7", "11"]),  # one row: its numbers above it
        ([7], 4, [], []),
        ([0, 1, 2, 3], 2, ["0", "2"], ["+0", "+1"]),
    ],
)
def test_the_labels_fit_the_numbers(
    written: Written, numbers: Sequence[int], columns: int, rows: list[str], heads: list[str]
) -> None:
    filter_sheet([flat(number) for number in numbers], SPEC, columns)
    assert (written.rows, written.columns) == (rows, heads)


def test_numbers_in_no_order_stand_under_their_pictures() -> None:
    names = [flat(number) for number in (3, 7, 11, 2)]
    page = np.asarray(filter_sheet(names, SPEC, columns=2))[..., 0]
    top = 12 + 2 * 24 + 4 + GAP // 2  # border, title, note, gap
    for index, number in enumerate((3, 7, 11, 2)):
        y, x = top + index // 2 * (384 + 14 + 2 * GAP), 12 + GAP // 2 + index % 2 * (384 + GAP)
        assert (page[y : y + 384, x : x + 384] == 2 * number).all()
        below = page[y + 385 + 1 : y + 384 + 14 + GAP, x : x + 384]
        assert np.argwhere(below < 128)[:, 1].mean() == pytest.approx(192, abs=3)


def test_the_caption_says_in_words_what_there_is(written: Written) -> None:
    filter_sheet([flat(number, 64) for number in range(4)], SPEC)
    assert written.title == "conv · net"
    assert (
        written.note == "filters 0 to 3 · each sees 24×16 px of the image · recipe fast, 10 steps · 64×64 px, shown ×6"
    )
    spec = {**SPEC, "layers": [""], "sees": ["whole"]}
    picture = Image.new("L", (400, 300))
    filter_sheet([SheetPicture(picture, "class_5"), SheetPicture(picture, "class_9")], spec)
    assert written.title == "the output · net"
    assert written.note == "classes 5, 9 · each sees the whole image · recipe fast, 10 steps · 300×400 px"
    filter_sheet([SheetPicture(picture, "layer")], {**SPEC, "sees": ["unknown"]})
    assert written.note == "recipe fast, 10 steps · 300×400 px"
    filter_sheet([flat(2 * number) for number in range(13)], {**SPEC, "sees": []})
    assert written.note == "13 filters · recipe fast, 10 steps · 384×384 px"


def test_a_dead_filter_is_crossed_out_and_a_plain_one_called_so(written: Written) -> None:
    filter_sheet([flat(100), flat(101, dead=True), flat(102, plain=True)], SPEC)
    ordinary, dead, plain = (cell(written.body, index, 3, 384)[1:-1, 1:-1] for index in range(3))
    assert (ordinary == 200).all()
    assert all((dead[k, k] == DEAD).all() and (dead[k, 383 - k] == DEAD).all() for k in range(5, 375, 5))
    assert (plain[:350] == 204).all()  # the picture is whole and as bright as ever
    word = plain[-22:, :50]
    assert (word == 255).all(2).mean() > 0.3
    assert (word < 60).all(2).any()
    assert (plain[:, 70:] == 204).all()
    assert (
        "1 crossed out: dead, nothing made it answer · 1 marked plain: a flat colour excites it as much" in written.note
    )
    filter_sheet([flat(1, dead=True), flat(2, dead=True)], SPEC)
    assert "2 crossed out: dead, nothing made them answer" in written.note
    assert "plain" not in written.note


def test_small_pictures_are_enlarged_smoothly_and_large_ones_left_alone(written: Written) -> None:
    halves = Image.new("L", (32, 32))
    halves.paste(255, (16, 0, 32, 32))
    filter_sheet([SheetPicture(halves, f"filter_{number}") for number in range(8)], SPEC, columns=8)
    levels = cell(written.body, 3, 8, 128)[64, 1:-1, 0].astype(int)
    assert (levels[0], levels[-1]) == (0, 255)
    assert (np.diff(levels) >= 0).all()
    assert len(set(levels)) > 3  # no hard edge
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))
    filter_sheet([SheetPicture(noise, f"filter_{number}") for number in range(16)], SPEC)
    assert np.array_equal(cell(written.body, 8, 4, 224)[1:-1, 1:-1], np.asarray(noise))


@pytest.mark.parametrize(
    ("side", "columns", "factor"),
    [(32, 10, 4), (64, 8, 2), (96, 6, 2), (96, 8, 1), (128, 1, 3), (128, 3, 3), (224, 1, 2), (500, 1, 1)],
)
def test_the_factor_fills_a_sheet(side: int, columns: int, factor: int) -> None:
    assert enlargement(side, columns) == factor


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (10, 5), (24, 6), (61, 8), (64, 8), (100, 10)]
)
def test_a_sheet_is_near_a_square_and_few_cells_are_empty(count: int, columns: int) -> None:
    assert near_square(count) == columns


@pytest.mark.parametrize(("count", "columns"), [(0, None), (3, 0)])
def test_a_sheet_of_nothing_is_refused(count: int, columns: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"not {count} pictures in"):
        filter_sheet([flat(number) for number in range(count)], SPEC, columns)
