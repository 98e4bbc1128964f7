"""Text on pictures: it leaves the picture as it is, and stands where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from phosphene.images.captions import (
    LETTERS,
    SHADE,
    colour_bar,
    index_labels,
    label_font,
    stack_images,
    table,
    text_column,
    with_axis_labels,
    with_caption,
    wrap_text,
)
from phosphene.images.display import apply_colormap


def grey_tile(value: int, width: int = 4, height: int = 3, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), value if mode == "L" else (value, value, value))


def test_a_caption_leaves_the_picture_as_it_is_and_makes_room_for_its_words() -> None:
    image = grey_tile(77, 30, 20)
    page = with_caption(image, "a title that is wider than the picture", "and a note")
    pixels = np.asarray(page)
    assert (pixels[64:84, 12:42] == 77).all()
    assert (pixels[84:] == 255).all()
    title = pixels[12:36, 12:-12]
    assert title.min() < 80
    assert (pixels[:, -12:] == 255).all()  # nothing of the words is cut off


def test_labels_stand_beside_their_rows_and_above_their_columns() -> None:
    image = grey_tile(77, 60, 60)
    page = np.asarray(with_axis_labels(image, {30: "12"}, {10: "3"}))
    left, top = page.shape[1] - 60, page.shape[0] - 60
    assert (page[top:, left:] == 77).all()
    assert np.argwhere(page[top:, :left, 0] < 200)[:, 0].mean() == pytest.approx(30, abs=2)
    assert np.argwhere(page[:top, left:, 0] < 200)[:, 1].mean() == pytest.approx(10, abs=2)
    assert with_axis_labels(image, {}).size == (60, 60)


def test_labels_are_as_close_as_there_is_room() -> None:
    assert index_labels(range(5, 8), 49, 14) == {24: "5", 73: "6", 122: "7"}
    assert index_labels(range(6), 10, 28, "+") == {5: "+0", 45: "+4"}


def test_pictures_are_joined_in_both_directions() -> None:
    pair = [grey_tile(10, 4, 3), grey_tile(20, 2, 5)]
    across, down = stack_images(pair, gap=2), stack_images(pair, down=True, gap=2)
    assert (across.size, down.size) == ((8, 5), (4, 10))
    assert [across.getpixel(pixel) for pixel in ((3, 2), (4, 0), (6, 4), (0, 4))] == [
        (10, 10, 10), (255, 255, 255), (20, 20, 20), (255, 255, 255)
    ]  # fmt: skip
    assert down.getpixel((1, 5)) == (20, 20, 20)


def test_a_colour_bar_runs_from_high_at_the_top_to_low() -> None:
    bar = colour_bar(-1, 3, "viridis", 101)
    coloured = apply_colormap(torch.tensor([255, 128, 0], dtype=torch.uint8)).tolist()
    pixels = [bar.getpixel((5, y)) for y in (0, 50, 100)]
    assert np.abs(np.array(pixels) - np.array(coloured)).max() <= 2
    longer = colour_bar(-1.2345e-12, 3, "viridis", 101)
    assert longer.width > bar.width


def test_a_table_keeps_its_columns_and_fills_the_width() -> None:
    short = table(("name", "kind", "number"), [("a", "b", "1")])
    wide = table(("name", "kind", "number"), [("a", "b", "1")], 900)
    assert (wide.width, wide.height) == (900, short.height)
    taller = table(("name", "kind", "number"), [("a", "b", "1"), ("c", "d", "2")])
    assert taller.height == short.height + 20
    assert taller.getpixel((1, 45)) == SHADE
    last = np.argwhere(np.asarray(wide)[:20, :, 0] < 200)[:, 1].max()
    assert 870 < last < 900  # numbers end at the right


def test_a_note_is_wrapped_between_its_parts() -> None:
    width = int(label_font().getlength("alpha · beta")) + 1
    assert wrap_text(["alpha", "beta", "gamma", "a part that is wider than a line"], width) == (
        "alpha · beta\ngamma\na part that is wider than a line"
    )
    assert wrap_text([], width) == ""


def test_cells_of_a_column_are_centred_on_their_pixels_and_end_at_the_right() -> None:
    page = np.asarray(text_column("mean", {30: "1", 70: "8"}, 100))[..., 0]
    assert page.shape[0] == LETTERS + 4 + 100
    for y in (30, 70):
        ink = np.argwhere(page[LETTERS + 4 + y - 12 : LETTERS + 4 + y + 12] < 200)
        assert ink[:, 0].mean() == pytest.approx(11.5, abs=2)
        assert ink[:, 1].max() >= page.shape[1] - 3
