"""Figures: display rules and grids by hand, and files that say the same twice."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from phosphene.errors import InvalidRequest
from phosphene.images import captions, encode
from phosphene.images.display import (
    DISPLAYS,
    apply_colormap,
    colormap_image,
    resized,
    standardise,
    standardise_map,
    stretch,
    to_bytes,
)
from phosphene.images.encode import gif, png
from phosphene.images.grid import DEAD, EMPTY, blank_tile, cross_out, grid, mosaic, picture
from phosphene.rendering import recipes


def tile(value: int, width: int = 4, height: int = 3, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), value if mode == "L" else (value, value, value))


def test_clip_holds_values_inside_zero_to_one() -> None:
    assert DISPLAYS["clip"](torch.tensor([[-0.5, 0.25, 1.5]])).tolist() == [[0.0, 0.25, 1.0]]


def test_stretch_by_hand() -> None:
    images = torch.tensor([[[[2.0, 3.0], [4.0, 6.0]]], [[[-1.0, 0.0], [0.0, 1.0]]], [[[7.0, 7.0], [7.0, 7.0]]]])
    assert stretch(images).flatten(1).tolist() == [[0.0, 0.25, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0] * 4]


def test_standardise_by_hand() -> None:
    # 0, 20, 40 and 260 in bytes: mean 80, deviations -80, -60, -40, 180, standard deviation sqrt(11000)
    images = torch.tensor([[[[0.0, 20 / 255], [40 / 255, 260 / 255]]]], dtype=torch.float64)
    expected = [0.5 + 0.1 * one / (11000**0.5 + 1e-5) for one in (-80, -60, -40, 180)]
    assert standardise(images).flatten().tolist() == pytest.approx(expected, rel=1e-12)
    one_in_many = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    one_in_many[0, 0, 0, 0] = 1.0  # twenty standard deviations up: clipped
    assert standardise(one_in_many).max().item() == 1.0
    assert standardise(torch.full((1, 1, 2, 2), 0.3)).flatten().tolist() == [0.5] * 4


def test_the_recipes_know_the_displays_there_are() -> None:
    assert set(DISPLAYS) == {"clip", "stretch", "standardise"}
    for display in DISPLAYS:
        assert dataclasses.replace(recipes.RECIPES["fourier"], display=display).display == display


def test_bytes_are_rounded_to_the_nearest() -> None:
    values = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 1.1])
    assert to_bytes(values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_every_byte_survives() -> None:
    values = torch.arange(256)
    assert to_bytes(values / 255).tolist() == values.tolist()


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
    sheet = np.asarray(grid([tile(10, mode="L"), tile(20, mode="L"), tile(30, mode="L")], columns=2, margin=1))
    assert sheet.tolist() == [
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [10, 10, 10, 10, 0, 20, 20, 20, 20],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [30, 30, 30, 30, 0, 0, 0, 0, 0],
        [30, 30, 30, 30, 0, 0, 0, 0, 0],
        [30, 30, 30, 30, 0, 0, 0, 0, 0],
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
    assert grid([tile(9)] * count, columns).size == size


def test_a_grid_is_in_colour_if_a_tile_is() -> None:
    mixed = grid([tile(100, mode="L"), tile(50)])
    assert mixed.mode == "RGB"
    assert mixed.getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(("count", "columns"), [(0, None), (3, 0), (3, -1)])
def test_a_grid_of_nothing_is_refused(count: int, columns: int | None) -> None:
    with pytest.raises(InvalidRequest, match=f"not {count} pictures in"):
        grid([tile(9)] * count, columns)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_crossed_tile_is_dark_with_a_red_cross(mode: str) -> None:
    plain = tile(200, 40, 40, mode)
    marked = cross_out(plain)
    assert marked.mode == "RGB"
    assert [marked.getpixel((k, k)) for k in (0, 20, 39)] == [DEAD] * 3
    assert [marked.getpixel((k, 39 - k)) for k in (0, 10, 39)] == [DEAD] * 3
    assert marked.getpixel((20, 5)) == (60, 60, 60)  # 30 % of 200
    assert plain.getpixel((0, 0)) == (200 if mode == "L" else (200, 200, 200))  # the tile itself is left alone


def test_png_bytes_are_the_same_twice_and_carry_their_metadata() -> None:
    metadata = {"layer": "block3_conv1", "channel": 7, "note": "Gewölbe ✓", "nested": {"b": [1, 2.5], "a": None}}
    image = tile(120)
    first = png(image, metadata)
    assert first == png(image, dict(reversed(metadata.items())))
    with Image.open(io.BytesIO(first)) as opened:
        assert json.loads(opened.text[encode.METADATA]) == metadata  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(opened), np.asarray(image))


def test_a_gif_shows_every_frame_and_rests_on_the_last() -> None:
    shades = (0, 80, 160, 240)
    first = gif([tile(shade, 8, 8) for shade in shades[:3]] + [tile(240, 16, 16)], milliseconds=50)
    assert first == gif([tile(shade, 8, 8) for shade in shades[:3]] + [tile(240, 16, 16)], milliseconds=50)
    with Image.open(io.BytesIO(first)) as opened:
        assert opened.n_frames == 4
        assert opened.info["loop"] == 0
        found = []
        for index in range(4):
            opened.seek(index)
            assert opened.size == (16, 16)  # smaller scales are enlarged to the last
            found.append((opened.convert("RGB").getpixel((3, 12)), opened.info["duration"]))
    assert found == [((shade,) * 3, duration) for shade, duration in zip(shades, (50, 50, 50, 1500), strict=True)]


def test_a_gif_of_one_frame() -> None:
    with Image.open(io.BytesIO(gif([tile(77)]))) as opened:
        assert opened.convert("RGB").getpixel((0, 0)) == (77, 77, 77)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_map_is_standardised_by_r4_1() -> None:
    # 0, 0, 0, 4: mean 1, deviation sqrt(3); a flat one becomes 128
    maps = torch.tensor([[[0.0, 0.0], [0.0, 4.0]], [[7.0, 7.0], [7.0, 7.0]]], dtype=torch.float64)
    low, high = 128 - 64 / 3**0.5, 128 + 3 * 64 / 3**0.5
    assert (int(low), int(high)) == (91, 238)
    assert standardise_map(maps).flatten().tolist() == [91, 91, 91, 238, 128, 128, 128, 128]


def test_levels_are_painted_with_the_map_s_own_entries() -> None:
    from matplotlib import colormaps

    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    painted = apply_colormap(levels, "viridis")
    assert painted.shape == (16, 16, 3)
    entries = [colormaps["viridis"](entry, bytes=True)[:3] for entry in range(256)]
    assert np.array_equal(painted.view(256, 3).numpy(), np.array(entries))
    assert painted[0, 0].tolist() == [68, 1, 84]  # the published ends of viridis
    assert painted[15, 15].tolist() == [253, 231, 36]
    assert np.array_equal(np.asarray(colormap_image(levels / 255)), painted.numpy())


def test_a_mosaic_by_hand() -> None:
    tiles = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 3) * 10
    sheet = np.asarray(mosaic(tiles, columns=2, gap=1, between=7))[..., 0]
    assert sheet.tolist() == [[0, 0, 7, 10, 10], [7, 7, 7, 7, 7], [20, 20, 7, 7, 7]]


def test_resizing_averages_areas_and_repeats() -> None:
    level = torch.tensor([[[0.0, 4.0, 8.0, 8.0]]])
    assert resized(level, (2, 2)).tolist() == [[[2, 8], [2, 8]]]
    assert resized(level[..., :2], (1, 6)).tolist() == [[[0, 0, 0, 4, 4, 4]]]


def test_a_caption_leaves_the_picture_as_it_is_and_makes_room_for_its_words() -> None:
    image = tile(77, 30, 20)
    page = captions.with_caption(image, "a title that is wider than the picture", "and a note")
    pixels = np.asarray(page)
    assert (pixels[64:84, 12:42] == 77).all()
    assert (pixels[84:] == 255).all()
    title = pixels[12:36, 12:-12]
    assert title.min() < 80
    assert (pixels[:, -12:] == 255).all()  # nothing of the words is cut off


def test_labels_stand_beside_their_rows_and_above_their_columns() -> None:
    image = tile(77, 60, 60)
    page = np.asarray(captions.with_axis_labels(image, {30: "12"}, {10: "3"}))
    left, top = page.shape[1] - 60, page.shape[0] - 60
    assert (page[top:, left:] == 77).all()
    assert np.argwhere(page[top:, :left, 0] < 200)[:, 0].mean() == pytest.approx(30, abs=2)
    assert np.argwhere(page[:top, left:, 0] < 200)[:, 1].mean() == pytest.approx(10, abs=2)
    assert captions.with_axis_labels(image, {}).size == (60, 60)


def test_pictures_are_joined_in_both_directions() -> None:
    pair = [tile(10, 4, 3), tile(20, 2, 5)]
    across, down = captions.stack_images(pair, gap=2), captions.stack_images(pair, down=True, gap=2)
    assert (across.size, down.size) == ((8, 5), (4, 10))
    assert [across.getpixel(place) for place in ((3, 2), (4, 0), (6, 4), (0, 4))] == [
        (10, 10, 10), (255, 255, 255), (20, 20, 20), (255, 255, 255)
    ]  # fmt: skip
    assert down.getpixel((1, 5)) == (20, 20, 20)


def test_a_colour_bar_runs_from_high_at_the_top_to_low() -> None:
    bar = captions.colour_bar(-1, 3, "viridis", 101)
    painted = apply_colormap(torch.tensor([255, 128, 0], dtype=torch.uint8)).tolist()
    found = [bar.getpixel((5, y)) for y in (0, 50, 100)]
    assert np.abs(np.array(found) - np.array(painted)).max() <= 2
    longer = captions.colour_bar(-1.2345e-12, 3, "viridis", 101)
    assert longer.width > bar.width


def test_a_table_keeps_its_columns_and_fills_the_width() -> None:
    short = captions.table(("name", "kind", "number"), [("a", "b", "1")])
    wide = captions.table(("name", "kind", "number"), [("a", "b", "1")], 900)
    assert (wide.width, wide.height) == (900, short.height)
    taller = captions.table(("name", "kind", "number"), [("a", "b", "1"), ("c", "d", "2")])
    assert taller.height == short.height + 20
    assert taller.getpixel((1, 45)) == captions.SHADE
    last = np.argwhere(np.asarray(wide)[:20, :, 0] < 200)[:, 1].max()
    assert 870 < last < 900  # numbers end at the right


def test_the_sign_of_a_blank_tile_is_a_ring_in_its_middle() -> None:
    marked = np.asarray(blank_tile(40, 60))
    ring = np.argwhere((marked != EMPTY).any(2))
    assert ring.mean(0).tolist() == pytest.approx([19.5, 29.5], abs=0.6)
    assert tuple(marked[19, 29]) == EMPTY
    assert len(ring) > 20


def test_less_effort_gives_the_same_picture() -> None:
    image = colormap_image(torch.rand(50, 50, generator=torch.Generator().manual_seed(0)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image, {}, effort=1)))), np.asarray(image))
    assert png(image, {}) == png(image, {}, effort=6)
