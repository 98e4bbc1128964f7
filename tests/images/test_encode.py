"""Pictures as files: equal input gives equal bytes, and metadata and frames survive."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image

from phosphene.images.display import colormap_image
from phosphene.images.encode import METADATA, decode_image, gif, pad_to_same_size, png, webp


def grey_tile(value: int, width: int = 4, height: int = 3, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), value if mode == "L" else (value, value, value))


def test_png_bytes_are_the_same_twice_and_carry_their_metadata() -> None:
    metadata = {"layer": "block3_conv1", "channel": 7, "note": "Gewölbe ✓", "nested": {"b": [1, 2.5], "a": None}}
    image = grey_tile(120)
    first = png(image, metadata)
    assert first == png(image, dict(reversed(metadata.items())))
    with Image.open(io.BytesIO(first)) as opened:
        assert json.loads(opened.text[METADATA]) == metadata  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(opened), np.asarray(image))


def test_less_effort_gives_the_same_picture() -> None:
    image = colormap_image(torch.rand(50, 50, generator=torch.Generator().manual_seed(0)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image, {}, effort=1)))), np.asarray(image))
    assert png(image, {}) == png(image, {}, effort=6)


def test_a_gif_shows_every_frame_and_rests_on_the_last() -> None:
    shades = (0, 80, 160, 240)
    first = gif([grey_tile(shade, 8, 8) for shade in shades[:3]] + [grey_tile(240, 16, 16)], milliseconds=50)
    assert first == gif([grey_tile(shade, 8, 8) for shade in shades[:3]] + [grey_tile(240, 16, 16)], milliseconds=50)
    with Image.open(io.BytesIO(first)) as opened:
        assert opened.n_frames == 4
        assert opened.info["loop"] == 0
        decoded = []
        for index in range(4):
            opened.seek(index)
            assert opened.size == (16, 16)  # smaller scales are enlarged to the last
            decoded.append((opened.convert("RGB").getpixel((3, 12)), opened.info["duration"]))
    assert decoded == [((shade,) * 3, duration) for shade, duration in zip(shades, (50, 50, 50, 1500), strict=True)]


def test_a_gif_of_one_frame() -> None:
    with Image.open(io.BytesIO(gif([grey_tile(77)]))) as opened:
        assert opened.convert("RGB").getpixel((0, 0)) == (77, 77, 77)


def test_a_webp_is_the_same_twice_and_close_to_the_picture() -> None:
    image = grey_tile(120, 16, 12)
    first = webp(image, quality=90)
    assert first == webp(image, quality=90)
    decoded = np.asarray(decode_image(first)).astype(int)
    assert decoded.shape == (12, 16, 3)
    assert np.abs(decoded - 120).max() <= 2


def test_frames_of_other_sizes_lie_on_white_paper() -> None:
    small, large = pad_to_same_size([grey_tile(10, 2, 5), grey_tile(20, 4, 3)])
    assert small.size == large.size == (4, 5)
    assert np.asarray(small)[..., 0].tolist() == [[10, 10, 255, 255]] * 5
    assert np.asarray(large)[..., 0].tolist() == [[20] * 4] * 3 + [[255] * 4] * 2
