"""Image tensors as pictures, tiles, mosaics and grids, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from phosphene.errors import InvalidRequest
from phosphene.images.display import to_bytes
from phosphene.images.grid import DEAD, EMPTY, blank_tile, cross_out, grid, mosaic, picture


def grey_tile(value: int, width: int = 4, height: int = 3, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), value if mode == "L" else (value, value, value))


def test_pictures_of_one_and_three_channels() -> None:
    image = torch.arange(24, dtype=torch.uint8).view(3, 2, 4) * 10
    colour = picture(image)
    assert (colour.mode, colour.size) == ("RGB", (4, 2))
    assert colour.getpixel((1, 0)) == (10, 90, 170)
    assert colour.getpixel((3, 1)) == (70, 150, 230)
    grey = picture(image[1:2])
    assert (grey.mode, grey.size) == ("L", (4, 2))
    assert np.asarray(grey).tolist() == image[1].tolist()


@pytest.mark.parametrize(("channels", "columns", "rows"), [(2, 2, 1), (4, 2, 2), (7, 3, 3)])
def test_a_picture_of_other_channels_is_a_grey_tile_each(channels: int, columns: int, rows: int) -> None:
    image = torch.rand(channels, 2, 4, generator=torch.Generator().manual_seed(0))
    sheet = picture(image)
    assert (sheet.mode, sheet.size) == ("L", (columns * 4, rows * 2))
    pixels = np.asarray(sheet)
    for index, band in enumerate(to_bytes(image)):
        top, left = 2 * (index // columns), 4 * (index % columns)
        assert pixels[top : top + 2, left : left + 4].tolist() == band.tolist()


def test_a_grid_by_hand() -> None:
    sheet = np.asarray(
        grid([grey_tile(10, mode="L"), grey_tile(20, mode="L"), grey_tile(30, mode="L")], columns=2, margin=1)
    )
    assert sheet.tolist() == [
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [30, 30, 30, 30, 0, 243, 243, 243, 243],
        [30, 30, 30, 30, 0, 243, 243, 243, 243],
        [30, 30, 30, 30, 0, 243, 243, 243, 243],
    ]


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [
        (1, None, (4, 3)),
        (6, None, (3 * 4 + 2 * 5, 2 * 3 + 5)),  # R1: six pictures, three wide
        (64, None, (8 * 4 + 7 * 5, 8 * 3 + 7 * 5)),  # R4.2: eight by eight
        (5, 5, (5 * 4 + 4 * 5, 3)),
        (5, 1, (4, 5 * 3 + 4 * 5)),
    ],
)
def test_the_size_of_a_grid(count: int, columns: int | None, size: tuple[int, int]) -> None:
    assert grid([grey_tile(9)] * count, columns).size == size


def test_a_grid_is_in_colour_if_a_tile_is() -> None:
    mixed = grid([grey_tile(100, mode="L"), grey_tile(50)])
    assert mixed.mode == "RGB"
    assert mixed.getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(("count", "columns"), [(0, None), (3, 0), (3, -1)])
def test_a_grid_of_nothing_is_refused(count: int, columns: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"not {count} pictures in"):
        grid([grey_tile(9)] * count, columns)


def test_a_mosaic_by_hand() -> None:
    tiles = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 3) * 10
    sheet = np.asarray(mosaic(tiles, columns=2, gap=1, between=7))[..., 0]
    assert sheet.tolist() == [[0, 0, 7, 10, 10], [7, 7, 7, 7, 7], [20, 20, 7, 7, 7]]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_crossed_tile_is_dark_with_a_red_cross(mode: str) -> None:
    plain = grey_tile(200, 40, 40, mode)
    marked = cross_out(plain)
    assert marked.mode == "RGB"
    assert [marked.getpixel((k, k)) for k in (0, 20, 39)] == [DEAD] * 3
    assert [marked.getpixel((k, 39 - k)) for k in (0, 10, 39)] == [DEAD] * 3
    assert marked.getpixel((20, 5)) == (60, 60, 60)  # 30 % of 200
    assert plain.getpixel((0, 0)) == (200 if mode == "L" else (200, 200, 200))  # the tile itself is left alone


def test_the_sign_of_a_blank_tile_is_a_ring_in_its_middle() -> None:
    marked = np.asarray(blank_tile(40, 60))
    ring = np.argwhere((marked != EMPTY).any(2))
    assert ring.mean(0).tolist() == pytest.approx([19.5, 29.5], abs=0.6)
    assert tuple(marked[19, 29]) == EMPTY
    assert len(ring) > 20
