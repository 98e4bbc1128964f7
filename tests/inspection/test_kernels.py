"""Kernels: the weights as they are, and tiles whose colours are the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from phosphene import errors
from phosphene.images import captions, display, encode
from phosphene.inspection.kernels import Kernels, KernelSheet, kernels, scale
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.network.preprocessing import Preprocessing

TOP = 12 + 2 * 24 + 4  # border, title, note, gap: where the picture under a caption begins
HEAD = 18  # labels of the columns


def handle(module: nn.Module, **options: Any) -> Model:
    return Model(module=module, name="net", input_size=(16, 16), **options)


def kernels_of(weights: Tensor, colours: str | None = None) -> Kernels:
    return Kernels(weights, {"model": "net", "layer": "conv", "colours": colours})


def colour(value: float, end: float = 1.0, name: str = "RdBu_r") -> tuple[int, ...]:
    """Return the colour of a weight on a scale from -end to end."""
    level = round((value / end + 1) / 2 * 255)
    return tuple(int(channel) for channel in colormaps[name](level, bytes=True)[:3])


def first_column(pixels: np.ndarray[Any, Any], row: int) -> int:
    """Return where the kernels begin on a line of pixels in which no label is written."""
    return int(np.argmax((pixels[row : row + 3].astype(int) != 255).any(2).all(0)))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_weights_are_a_copy_of_the_layer_s_in_one_layout() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, (3, 5)), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 6, 3, groups=6))
    layers = [kernels(handle(net), address) for address in ("0", 1, ".2")]
    assert [tuple(layer.weights.shape) for layer in layers] == [(4, 3, 3, 5), (6, 4, 2, 2), (6, 1, 3, 3)]
    assert layers[0].weights.equal(net.state_dict()["0.weight"])
    assert layers[1].weights[5, 2].equal(net.state_dict()["1.weight"][2, 5])
    layers[0].weights.zero_()
    assert bool(net.state_dict()["0.weight"].any())
    assert repr(layers[2]) == "Kernels(6×1×3×3 of .2 in net)"
    assert [layer.spec["colours"] for layer in layers] == ["rgb", None, None]


def test_a_layer_without_kernels_is_refused_and_the_nearest_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    with pytest.raises(
        errors.LayerRefused, match=r"\.3 is a Linear, which has no kernels .*; the nearest that have: \.0$"
    ):
        kernels(handle(net), ".3")
    with pytest.raises(errors.LayerRefused, match="and no layer of this network has any"):
        kernels(handle(nn.Sequential(nn.Flatten(), nn.Linear(768, 2))), ".1")
    with pytest.raises(errors.LayerNotFound):
        kernels(handle(net), "conv")
    net.state_dict()["0.weight"][0, 0, 0, 0] = float("inf")
    with pytest.raises(errors.WeightsRefused, match=r"the kernels of \.0 hold NaN or infinity"):
        kernels(handle(net), 0)


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_one_row_a_filter_one_column_an_input_channel_in_the_colours_of_the_scale() -> None:
    weights = torch.linspace(-1, 0.75, 10 * 5 * 9).view(10, 5, 3, 3)  # R2.2b's layout; the scale reaches from -1 to 1
    page = np.asarray(kernels_of(weights).grid())
    tile = 48 + 1  # a kernel of 3×3, 16 times enlarged, and a line
    left = first_column(page, TOP + HEAD)
    for out, channel, y, x in ((0, 0, 0, 0), (0, 4, 1, 2), (3, 2, 2, 0), (9, 4, 2, 2), (9, 0, 0, 1)):
        top, start = TOP + HEAD + out * tile + y * 16, left + channel * tile + x * 16
        expected = colour(float(weights[out, channel, y, x]))
        assert tuple(page[top, start]) == expected
        assert tuple(page[top + 15, start + 15]) == expected
    assert tuple(page[TOP + HEAD + 48, left + 7]) == (195, 195, 195)
    assert tuple(page[TOP + HEAD, left]) == colour(-1)


def test_the_grey_style_stretches_all_together_from_the_lowest_to_the_highest() -> None:
    weights = torch.tensor([1.0, 2, 3, 5]).view(2, 2, 1, 1)
    page = np.asarray(kernels_of(weights).grid(style="grey"))
    left = first_column(page, TOP + HEAD)
    levels = [page[TOP + HEAD + row * 49, left + column * 49, 0] for row in (0, 1) for column in (0, 1)]
    assert levels == [0, 64, 128, 255]
    with pytest.raises(errors.InvalidRequest, match="there is no style 'jet'; there are: signed, grey"):
        kernels_of(weights).grid(style="jet")


def test_the_scale_is_symmetric_and_an_outlier_does_not_take_the_colour_from_the_others() -> None:
    assert scale(torch.tensor([-0.5, 0.25]), True) == (-0.5, 0.5)
    assert scale(torch.tensor([-0.5, 0.25]), False) == (-0.5, 0.25)
    assert scale(torch.zeros(3), True) == (-1.0, 1.0)
    outlier = torch.cat([torch.ones(99), torch.tensor([100.0])])  # root mean square sqrt(100.99)
    low, high = scale(outlier, True)
    assert high == pytest.approx(4 * 100.99**0.5, rel=1e-9)
    assert low == -high
    page = np.asarray(kernels_of(outlier.view(100, 1, 1, 1)).grid())
    assert (page == colour(1)).all(2).any()


def test_depthwise_kernels_fill_a_near_square_grid_row_by_row() -> None:
    weights = torch.linspace(-1, 1, 7 * 4).view(7, 1, 2, 2)
    page = np.asarray(kernels_of(weights).grid())
    left = first_column(page, TOP + HEAD)
    for index in range(7):
        row, column = divmod(index, 3)
        assert tuple(page[TOP + HEAD + row * 49, left + column * 49]) == colour(float(weights[index, 0, 0, 0]))
    assert (page[TOP + HEAD + 2 * 49 :, left + 49 : left + 3 * 49] == 255).all()  # no eighth, no ninth


def test_rows_go_on_in_a_further_block_where_filters_see_few_channels() -> None:
    sheet = KernelSheet.of(torch.zeros(64, 3, 3, 3))
    assert (sheet.rows, sheet.columns, len(sheet.pages)) == (16, 3, 1)
    assert KernelSheet.of(torch.zeros(10, 5, 3, 3))[1:] == (10, 5, [(range(10), range(5))])


@pytest.mark.parametrize(
    "shape", [(512, 512, 3, 3), (2048, 64, 1, 1), (1000, 3, 16, 16), (64, 64, 31, 31), (5, 700, 1, 7)]
)
def test_pages_hold_every_kernel_once_and_are_bounded(shape: tuple[int, int, int, int]) -> None:
    weights = torch.zeros(1, 1, *shape[2:]).expand(shape)
    sheet = KernelSheet.of(weights)
    drawn = np.zeros(shape[:2], int)
    for filters, channels in sheet.pages:
        drawn[filters.start : filters.stop, channels.start : channels.stop] += 1
        assert len(filters) <= sheet.rows * max(1, 2700 // (sheet.columns * (shape[3] * sheet.factor + 1)))
        assert len(channels) * (shape[3] * sheet.factor + 1) <= 2700
        assert sheet.rows * (shape[2] * sheet.factor + 1) <= 2700
    assert bool((drawn == 1).all())
    assert sheet.factor * max(shape[2:]) >= 9


def test_the_pages_of_a_large_layer(tmp_path: Path) -> None:
    weights = torch.zeros(3, 300, 3, 3)
    weights[1, 256:, 0, 0] = 1.0
    many = kernels_of(weights)
    assert many.pages == 2
    second = np.asarray(many.grid(1))
    height = 3 * KernelSheet.of(weights).factor + 1
    left = first_column(second, TOP + HEAD)
    assert tuple(second[TOP + HEAD + height, left]) == colour(1)
    with pytest.raises(errors.InvalidRequest, match="conv has no page 2: it has 2, counted from 0"):
        many.grid(2)
    paths = many.save(tmp_path / "conv.png")
    assert [path.name for path in paths] == ["conv.png", "conv_page2.png"]
    with Image.open(paths[1]) as opened:
        metadata = json.loads(opened.text[encode.METADATA])  # type: ignore[attr-defined]
    assert (metadata["layer"], metadata["page"]) == ("conv", 1)


# --- in colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "expected"), [("rgb", (255, 128, 64)), ("bgr", (64, 128, 255))])
def test_filters_of_the_first_layer_in_colour(order: str, expected: tuple[int, ...]) -> None:
    weights = torch.zeros(4, 3, 1, 1)
    weights[0, :, 0, 0] = torch.tensor([1.0, 0.0, -0.5])
    page = np.asarray(kernels_of(weights, order).rgb())
    left = first_column(page, TOP + HEAD)
    assert tuple(page[TOP + HEAD, left]) == expected
    assert tuple(page[TOP + HEAD + 49, left]) == (128, 128, 128)
    with pytest.raises(errors.LayerRefused, match="conv has 2 input channels; a colour has 3"):
        kernels_of(weights[:, :2]).rgb()


def test_only_the_first_layer_of_a_network_that_sees_colour_is_shown_in_colour() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 3))
    assert kernels(handle(net, preprocessing=Preprocessing(bgr=True)), 0).spec["colours"] == "bgr"
    assert kernels(handle(net), 1).spec["colours"] is None
    both, grid = next(kernels(handle(net), 0).pictures()), kernels(handle(net), 0).grid()
    assert both.width > grid.width
    assert len(list(kernels(handle(net), 1).pictures())) == 1


def test_the_built_in_network_shows_a_green_filter_in_green() -> None:
    first = kernels(load("builtin/vgg19"), "block1_conv1")
    assert first.weights.shape == (64, 3, 3, 3)
    assert first.spec["colours"] == "bgr"
    page = np.asarray(first.rgb()).astype(int)
    left = first_column(page, TOP + HEAD)
    red, green, blue = page[TOP + HEAD + 49 + 24, left + 4 * 49 + 24]  # filter 12: green against red and blue
    assert green > red + 60
    assert green > blue + 60


def test_the_colours_of_kernels_that_fill_several_pages_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[list[str]] = []
    draw = captions.with_axis_labels

    def note(sheet: display.Picture, rows: dict[int, str], columns: dict[int, str] | None = None) -> display.Picture:
        named.append(list((columns or {}).values()))
        return draw(sheet, rows, columns)

    monkeypatch.setattr(captions, "with_axis_labels", note)
    monkeypatch.setattr(sys.modules["phosphene.inspection.kernels"], "PAGE", 90)  # room for two columns of 40 px
    sheets = kernels_of(torch.rand(2, 3, 40, 40), "bgr")
    for page in range(sheets.pages):
        sheets.grid(page)
    assert named == [["B", "G"], ["R"]]


# --- one pixel a weight -----------------------------------------------------------------------------------------------


def pixel(share: float) -> list[int]:
    """Return the colour of a weight that is such a share of its filter's largest."""
    end = (179, 88, 6) if share > 0 else (33, 102, 172)
    return [round(255 + abs(share) * (channel - 255)) for channel in end]


def test_a_pixel_is_a_weight_and_each_filter_has_its_scale() -> None:
    weights = torch.zeros(3, 2, 1, 2)
    weights[0, 1] = torch.tensor([[-2.0, 1.0]])
    weights[0, 0, 0, 1] = 0.5
    weights[2, 0] = torch.tensor([[0.0, 0.01]])
    image, legend = kernels_of(weights).pixels([2, 0, 1])
    assert legend == {
        "tile": [2, 1],
        "columns": 2,
        "inputs": [[0, 1], [1, 0], [0, 1]],  # strongest first; of equal ones the lower number
        "scale": [pytest.approx(0.01), 2, 0],
        "colours": "signed",
        "of": 2,
    }
    white, orange, blue = [255] * 3, [179, 88, 6], [33, 102, 172]
    assert np.asarray(image).tolist() == [
        [white, orange, white, white],
        [blue, [217, 172, 130], white, [236, 213, 193]],  # halfway to orange, and a quarter
        [white] * 4,
    ]


def test_the_strongest_inputs_are_those_of_the_largest_norm() -> None:
    weights = torch.randn(5, 30, 3, 2, generator=torch.Generator().manual_seed(3))
    image, legend = kernels_of(weights).pixels(range(5))
    pixels = np.asarray(image)
    assert pixels.shape == (15, 24, 3)
    for number, kernels_in in enumerate(weights.double()):
        norms = [sum(float(w) ** 2 for w in kernel.flatten()) ** 0.5 for kernel in kernels_in]
        order = sorted(range(30), key=lambda channel: -norms[channel])[:12]
        largest = max(abs(float(w)) for w in kernels_in.flatten())
        assert (legend["inputs"][number], legend["scale"][number], legend["of"]) == (order, largest, 30)
        for column, channel in enumerate(order):
            tile = pixels[number * 3 : number * 3 + 3, column * 2 : column * 2 + 2].tolist()
            assert tile == [[pixel(float(w) / largest) for w in row] for row in kernels_in[channel]]


@pytest.mark.parametrize(("order", "expected"), [("rgb", [255, 128, 64]), ("bgr", [64, 128, 255])])
def test_a_filter_of_the_first_layer_is_one_tile_in_colour(order: str, expected: list[int]) -> None:
    weights = torch.zeros(2, 3, 1, 1)
    weights[0, :, 0, 0] = torch.tensor([4.0, 0.0, -2.0])
    image, legend = kernels_of(weights, order).pixels([0, 1])
    assert np.asarray(image).tolist() == [[expected], [[128] * 3]]
    assert legend == {
        "tile": [1, 1],
        "columns": 1,
        "inputs": [[0, 1, 2]] * 2,
        "scale": [4, 0],
        "colours": "rgb",
        "of": 3,
    }


def test_kernels_of_half_precision_and_of_one_channel_each() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)).bfloat16()
    halves = kernels(handle(net, channels_in=4), 0)
    image, legend = halves.pixels([3, 6])
    assert (image.size, legend["inputs"], legend["of"]) == ((3, 6), [[0], [0]], 1)
    rows = [
        pixel(float(w) / scale)
        for n, scale in zip((3, 6), legend["scale"], strict=True)
        for w in halves.weights[n].flatten()
    ]
    assert np.asarray(image).reshape(-1, 3).tolist() == rows
