"""Sprite sheets."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from phosphene.images.sprites import preview_strip, sprite_sheets, thumbnail, tile, tile_size


def plain_pictures(*colours: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in colours]


@pytest.mark.parametrize(
    ("size", "tile"), [((128, 128), (96, 96)), ((32, 20), (32, 20)), ((192, 96), (96, 48)), ((2000, 1), (96, 1))]
)
def test_a_tile_is_at_most_96_pixels(size: tuple[int, int], tile: tuple[int, int]) -> None:
    assert tile_size(size) == tile


def test_tiles_lie_row_by_row() -> None:
    colours = [(40 * number, 0, 0) for number in range(5)]
    sheet = np.asarray(tile(plain_pictures(*colours, size=(2, 3)), 2))
    assert sheet.shape == (9, 4, 3)
    assert sheet[::3, ::2, 0].tolist() == [[0, 40], [80, 120], [160, 255]]


def test_a_picture_shrinks_to_its_tile_without_aliasing() -> None:
    stripes = np.zeros((192, 192, 3), np.uint8)
    stripes[:, ::2] = 200
    tile = np.asarray(thumbnail(Image.fromarray(stripes), (96, 96)))
    assert tile.shape == (96, 96, 3)
    assert np.abs(tile[:, 8:-8].astype(int) - 100).max() <= 2


def test_one_sheet_holds_a_layer() -> None:
    grey = [(20 * number,) * 3 for number in range(7)]
    (sheet,) = sprite_sheets(plain_pictures(*grey, size=(128, 128)), [3, 4, 5, 9, 10, 11, 12])
    assert sheet.facts == {
        "file": "sheet.webp",
        "tile": [96, 96],
        "columns": 3,
        "channels": [3, 4, 5, 9, 10, 11, 12],
    }
    pixels = np.asarray(Image.open(io.BytesIO(sheet.content)).convert("L")).astype(int)
    assert pixels.shape == (288, 288)
    for number in range(7):
        row, column = divmod(number, 3)
        assert abs(pixels[row * 96 + 48, column * 96 + 48] - 20 * number) <= 3
    assert next(sprite_sheets(plain_pictures(*grey, size=(128, 128)), range(7))).content == sheet.content


def test_a_layer_that_one_sheet_does_not_hold_gets_several() -> None:
    sheets = list(sprite_sheets(plain_pictures(*[(0, 0, 0)] * 14, size=(8, 12)), range(14), most=6))
    assert [(sheet.name, sheet.facts["channels"]) for sheet in sheets] == [
        ("sheet.webp", list(range(6))),
        ("sheet_2.webp", list(range(6, 12))),
        ("sheet_3.webp", [12, 13]),
    ]
    sizes = [Image.open(io.BytesIO(sheet.content)).size for sheet in sheets]
    assert sizes == [(24, 24), (24, 24), (16, 12)]  # 3 wide, 2 high, and 2 wide


def test_256_tiles_make_a_sheet() -> None:
    dots = plain_pictures(*[(9, 9, 9)] * 257, size=(96, 1))
    assert [len(sheet.facts["channels"]) for sheet in sprite_sheets(dots, range(257))] == [256, 1]


def test_a_strip_shows_twelve_pictures_evenly_spread() -> None:
    indices = [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35, 39]  # of 40, 39/11 apart
    strip = preview_strip(plain_pictures(*[(6 * number,) * 3 for number in range(40)], size=(128, 96)), range(100, 140))
    assert strip.name == "strip.webp"
    assert strip.facts == {
        "file": "strip.webp",
        "tile": [64, 48],
        "columns": 12,
        "channels": [100 + index for index in indices],
    }
    pixels = np.asarray(Image.open(io.BytesIO(strip.content)).convert("L")).astype(int)
    assert pixels.shape == (48, 768)
    assert np.abs(pixels[24, 32::64] - 6 * np.array(indices)).max() <= 3


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_strip_of_few_pictures_shows_them_all(count: int) -> None:
    strip = preview_strip(plain_pictures(*[(20 * number,) * 3 for number in range(count)]), range(count))
    assert (strip.facts["channels"], strip.facts["columns"]) == (list(range(count)), count)
    assert Image.open(io.BytesIO(strip.content)).size == (8 * count, 8)
