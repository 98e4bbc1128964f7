"""Crops: each tile is what a channel's peak saw of the photo, and photos are shown whole."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from phosphene.evidence import crops
from phosphene.evidence.collect import evidence, plan_photo_pass
from phosphene.evidence.statistics import Evidence
from phosphene.evidence.top_photos import NO_PHOTO
from phosphene.images.encode import png
from phosphene.network.layers import ReceptiveField
from phosphene.network.model import Model
from phosphene.progress import Bar
from random_photos import GeneratedPhotos, random_photos, small_model


def test_windows_by_hand(small_net: nn.Sequential) -> None:
    # convolution 3×3 with padding 1, pooling by 2, convolution 3×3 with padding 1: 8 px from -3, in steps of 2
    layer = small_model(small_net, 32).find(".4")
    assert layer.receptive_field == ReceptiveField((8, 8), (2, 2), (3, 3))
    assert crops.window(layer, (5, 0), (32, 32)) == (7, -3, 8, 8)
    assert crops.window(layer, (1, 1), (8, 8)) == (0, 0, 8, 8)  # the field is the photo's size
    assert crops.window(replace(layer, receptive_field=None), (5, 0), (32, 32)) == (0, 0, 32, 32)


def pixels_of(content: bytes, mode: str = "RGB") -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


def brightest(result: Evidence, name: str, rank: int, channel: int) -> tuple[int, int]:
    """Return row and column of the brightest pixel of a tile."""
    sheet = pixels_of(result.sheets[name], "L")
    tile = sheet[channel * 64 : channel * 64 + 64, rank * 64 : rank * 64 + 64]
    row, column = np.unravel_index(tile.argmax(), tile.shape)
    return int(row), int(column)


def test_a_crop_shows_what_the_channel_answered_to() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False))
    with torch.no_grad():
        first, second = net.parameters()
        first.fill_(0)[:, :, 1, 1] = 1
        second.fill_(0)[:, :, 2, 1] = 1  # looks at the pixel below
    photos = torch.full((3, 3, 20, 20), 0.1)
    photos[0, :, 12, 5], photos[1, :, 19, 18] = 1.0, 0.8
    result = evidence(small_model(net, 20), photos, [1], top=4)
    assert result[".1"].positions[0, :2].tolist() == [[11, 5], [18, 18]]
    # a field of 5 px around the peak in squares of 12.8 px: the spot is one below the middle one, 38 to 51
    for rank in range(2):
        row, column = brightest(result, "crops_0_0.webp", rank, 0)
        assert 38 <= row <= 51
        assert 25 <= column <= 38
    sheet = pixels_of(result.sheets["crops_0_0.webp"]).astype(float)
    assert sheet.shape == (64, 4 * 64, 3)
    outside = sheet[:, 64 + 56 : 128]  # beyond the right border of the second photo, whose column 18 is the middle
    assert abs(outside - 128).max() < 6
    empty = sheet[:, 3 * 64 + 8 :]  # there is no fourth photo
    assert abs(empty - 38).max() < 6
    assert result.about["names"] == {"0": "photo 0", "1": "photo 1", "2": "photo 2"}
    assert result.about["sheets"] == {".1": ["crops_0_0.webp"]}


def test_many_channels_go_on_several_sheets_and_photos_are_read_once() -> None:
    photos = GeneratedPhotos(7)
    result = evidence(small_model(nn.Sequential(nn.Conv2d(3, 130, 1))), photos, [0], top=2)
    assert result.about["sheets"] == {".0": ["crops_0_0.webp", "crops_0_1.webp"]}
    heights = [Image.open(io.BytesIO(result.sheets[f"crops_0_{page}.webp"])).height for page in range(2)]
    assert heights == [128 * 64, 2 * 64]
    winners = {*result[".0"].photos.flatten().tolist()}
    assert sorted(photos.requested[10:]) == sorted(winners)  # after three for the spec, and all seven


def test_layers_that_do_not_fit_the_memory_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    together = evidence(model, random_photos(5), "*", top=2).sheets
    monkeypatch.setattr(crops, "OPEN_BYTES", 100_000)
    assert list(crops.layer_groups([4, 4, 4, 20, 1])) == [[0, 1], [2], [3], [4]]
    assert evidence(model, random_photos(5), "*", top=2).sheets == together


# --- whole photos -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sheets written so that their pixels can be compared."""
    monkeypatch.setattr(crops, "webp", lambda image, quality, effort: png(image, {}, 1))


def whole_photos(result: Evidence) -> dict[int, np.ndarray[Any, Any]]:
    """Return the tiles of the photos that are shown whole, by number."""
    about = result.about["thumbnails"]
    (width, height), columns, rows = about["tile"], about["columns"], about["rows"]
    sheets = [pixels_of(result.sheets[name]) for name in about["sheets"]]
    tiles = {}
    for index, number in enumerate(about["photos"]):
        page, cell = divmod(index, columns * rows)
        assert sheets[page].shape == (rows * height, columns * width, 3)
        row, column = divmod(cell, columns)
        tiles[number] = sheets[page][row * height :, column * width :][:height, :width]
    return tiles


@pytest.mark.usefixtures("lossless")
@pytest.mark.parametrize(("size", "tile"), [((30, 30), (30, 30)), ((150, 200), (112, 84)), ((150, 40), (30, 112))])
def test_the_strongest_photos_are_shown_whole_as_the_network_saw_them(
    size: tuple[int, int], tile: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = Model(module=nn.Sequential(nn.Conv2d(3, 7, 3)), name="net", input_size=size)
    photos = torch.nn.functional.interpolate(random_photos(60, 8), (170, 210), mode="bilinear")
    result = evidence(model, photos, [0], top=6)
    winners = sorted({*result[".0"].photos.flatten().tolist()})
    about = result.about["thumbnails"]
    assert (about["photos"], tuple(about["tile"])) == (winners, tile)
    assert about["sheets"] == [f"photos_{page}.webp" for page in range(-(-len(winners) // 25))]
    for number, pixels in whole_photos(result).items():
        image = model.fitted(photos[number : number + 1])[0][0]
        expected = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        assert np.array_equal(pixels, np.asarray(expected.resize(tile, Image.Resampling.LANCZOS))), number


@pytest.mark.usefixtures("lossless")
def test_many_photos_go_on_several_sheets_each_whole_when_it_is_full() -> None:
    photo_pass = plan_photo_pass(small_model(nn.Sequential(nn.Conv2d(3, 2, 1))), photos := GeneratedPhotos(100), [0])
    top = crops.TopPositions(torch.arange(60).view(2, 30), torch.zeros(2, 30, 2, dtype=torch.long))
    photos.requested.clear()
    bar = Bar("crops", "photos")
    progress = [(name, len(photos.requested)) for name, _ in crops.sheets(photo_pass, [top], bar)]
    assert (bar.done, bar.total) == (60, 60)
    # no more than one sheet of 25 is in memory at a time
    assert progress == [("photos_0.webp", 25), ("photos_1.webp", 50), ("photos_2.webp", 60), ("crops_0_0.webp", 60)]


def test_of_too_many_photos_the_strongest_are_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    top = [
        crops.TopPositions(torch.tensor([[7, 3, 9], [8, 7, NO_PHOTO]]), torch.zeros(2, 3, 2)),
        crops.TopPositions(torch.tensor([[5, 1, 2]]), torch.zeros(1, 3, 2)),
    ]
    assert crops.whole_photos(top) == [1, 2, 3, 5, 7, 8, 9]
    for most, expected in ((4, [3, 5, 7, 8]), (2, [7, 8]), (5, [1, 3, 5, 7, 8])):
        monkeypatch.setattr(crops, "MAX_WHOLE", most)
        assert crops.whole_photos(top) == expected
    assert crops.whole_photos([crops.TopPositions(torch.full((2, 3), NO_PHOTO), torch.zeros(2, 3, 2))]) == []
