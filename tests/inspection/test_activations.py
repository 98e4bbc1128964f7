"""Activations: what was read is what was computed, and the pages show it by R4.1's rule."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from fake_terminal import counts
from phosphene import errors
from phosphene.images import encode, grid
from phosphene.inspection.activations import Activations, activations, as_maps
from phosphene.network.layers import Layers
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.progress import Bar

Guard = Callable[[nn.Module], AbstractContextManager[None]]


def handle(module: nn.Module, size: int = 8, **options: Any) -> Model:
    return Model(module=module, name="net", input_size=(size, size), **options)


def photo(height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def activations_of(**tensors: Tensor) -> Activations:
    """Return activations that hold these very tensors, by the name of their layer."""
    net = nn.Sequential()
    for name in tensors:
        net.add_module(name, nn.ReLU())
    layers = Layers([layer for layer in handle(net).layers() if layer.path in tensors])
    return Activations(tensors, layers, {"model": "net", "size": (8, 8)})


def viridis(level: int) -> tuple[int, ...]:
    return tuple(int(value) for value in colormaps["viridis"](level, bytes=True)[:3])


def tile_at(page: Image.Image, index: int, tile: int, columns: int = 16) -> np.ndarray[Any, Any]:
    """Return the pixels of a tile of a grid: above are a border of 12, two lines of 24, 4, and labels; labels left."""
    row, column = divmod(index, columns)
    pixels = np.asarray(page)
    top = 12 + 2 * 24 + 4 + 18
    left = sheet_left(pixels, top) + column * (tile + 2)
    top += row * (tile + 2)
    return pixels[top : top + tile, left : left + tile]


def sheet_left(pixels: np.ndarray[Any, Any], top: int) -> int:
    """Return where the first row of tiles begins: the first column without paper or grey writing in it."""
    band = pixels[top : top + 4].astype(int)
    coloured = (np.abs(band - 255).sum(2) > 30).all(0)
    return int(np.argmax(coloured))


# --- reading ----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A network with an addition and a ReLU that runs twice, nothing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Any:
        inner = self.act(self.first(image))
        outer = self.act(self.second(inner) + inner[..., 1:-1, 1:-1])
        return self.head(self.pool(outer).flatten(1))


def test_activations_equal_what_plain_hooks_see_where_nothing_is_in_place() -> None:
    torch.manual_seed(0)
    net = Branches().eval()
    outputs: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, value, name=name: outputs.setdefault(name, []).append(value.clone())
        )
        for name, module in net.named_modules()
        if name
    ]
    image = photo()
    with torch.no_grad():
        net(image)
    for hook in hooks:
        hook.remove()
    acts = activations(handle(net), image)
    expected = {name: calls[0] for name, calls in outputs.items() if name != "act"}
    expected |= {f"act@{call}": output for call, output in enumerate(outputs["act"])}
    assert list(acts) == ["first", "act@0", "second", "act@1", "pool", "head"]
    for path, value in expected.items():
        assert acts[path].equal(value[0]), path
        assert not acts[path].requires_grad


def test_activations_are_exact_where_relus_are_in_place(small_net: nn.Sequential, untouched: Guard) -> None:
    image = photo(seed=1).double()
    with torch.no_grad():
        first = small_net[0](image)
        normal = small_net[1](first)
        pooled = small_net[3](torch.relu(normal))
    model = handle(small_net)
    with untouched(small_net):
        acts = activations(model, image)
    for path, value in ((".0", first), (".1", normal), (".2", torch.relu(normal)), (".3", pooled)):
        torch.testing.assert_close(acts[path], value[0], rtol=0, atol=0)
    assert bool((acts[".1"] < 0).any())


def test_all_layers_come_from_one_forward_pass_and_without_gradients() -> None:
    calls: list[bool] = []

    class Counting(nn.Sequential):
        def forward(self, image: Tensor) -> Any:
            calls.append(torch.is_grad_enabled())
            return super().forward(image)  # type: ignore[no-untyped-call]

    model = handle(Counting(nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 2)))
    assert len(model.layers()) == 4
    calls.clear()
    acts = activations(model, photo())
    assert calls == [False]
    assert {path: tuple(value.shape) for path, value in acts.items()} == {
        ".0": (2, 6, 6), ".1": (2, 6, 6), ".2": (72,), ".3": (2,)
    }  # fmt: skip


def test_layers_are_chosen_by_a_glob_or_by_addresses(small_net: nn.Sequential) -> None:
    model = handle(small_net)
    image = photo().double()
    assert list(activations(model, image, "*[01]")) == [".0", ".1"]
    assert list(activations(model, image, [1, "0", 0])) == [".4", ".0"]
    with pytest.raises(errors.LayerNotFound, match="no layer matches"):
        activations(model, image, "conv*")
    with pytest.raises(errors.LayerNotFound, match=r"no activations of '\.3' were taken; the nearest are"):
        activations(model, image, [0])[".3"]


def test_a_photo_is_fitted_and_a_network_without_convolutions_works() -> None:
    linear = nn.Linear(3 * 64, 3)
    with torch.no_grad():
        linear.weight.fill_(1 / 192)
        linear.bias.copy_(torch.tensor([0.0, 1.0, -2.0]))
    net = nn.Sequential(nn.Flatten(), linear, nn.ReLU())
    wide = torch.zeros(1, 3, 8, 24)
    wide[..., 8:16] = 0.5  # the middle, which is all that the network sees
    acts = activations(handle(net), wide)
    assert acts[".1"].tolist() == pytest.approx([0.5, 1.5, -1.5])
    assert acts[".2"].tolist() == pytest.approx([0.5, 1.5, 0.0])
    assert acts.spec["region"] == [0.0, 8.0, 8.0, 8.0]
    row = acts.rows()[2]
    assert (row["channels"], row["map"], row["blank"]) == (3, None, pytest.approx(1 / 3))
    assert acts.grid(".2").width > 0


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_what_is_no_photo_is_refused(wrong: Tensor) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"is a floating tensor \(1, 3, height, width\)"):
        activations(handle(nn.Sequential(nn.Conv2d(3, 2, 3))), wrong)


# --- maps -------------------------------------------------------------------------------------------------------------


def test_tokens_lie_in_their_grid_and_channels_last_come_first() -> None:
    tokens = torch.arange(10.0).view(5, 2)  # one class token, then 2×2
    assert as_maps(tokens, False, (8, 8)).tolist() == [[[2, 4], [6, 8]], [[3, 5], [7, 9]]]
    last = torch.arange(12.0).view(2, 2, 3)
    assert as_maps(last, False, (8, 8))[1].tolist() == [[1, 4], [7, 10]]
    assert as_maps(last, True, (8, 8)) is last
    assert as_maps(torch.tensor([4.0, 5.0]), False, (8, 8)).tolist() == [[[4]], [[5]]]


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_grid_standardises_each_channel_by_r4_and_marks_blank_ones() -> None:
    # 1, 2, 3, 6: mean 3, deviation sqrt(14/4); levels 128 + 64 (value - 3) / deviation, cut, clipped
    maps = torch.full((18, 2, 2), 5.0)
    maps[0] = torch.tensor([[1.0, 2], [3, 6]])
    maps[17] = maps[0] * 1000 - 7
    maps[1, 0, 0] = math.nan
    levels = [math.floor(min(255, 128 + 64 * (value - 3) / math.sqrt(3.5))) for value in (1, 2, 3, 6)]
    assert levels == [59, 93, 128, 230]
    page = activations_of(layer=maps).grid("layer")
    for index in (0, 17):
        tile = tile_at(page, index, 40)
        corners = [tuple(tile[y, x]) for y, x in ((0, 0), (19, 39), (39, 0), (20, 20))]
        assert corners == [viridis(level) for level in levels]
    assert tuple(tile_at(page, 2, 40)[0, 0]) == grid.EMPTY
    assert tuple(tile_at(page, 1, 40)[0, 0]) == grid.DEAD
    rings = np.asarray(grid.blank_tile(40, 40))
    assert np.array_equal(tile_at(page, 16, 40), rings)


def test_a_level_far_off_is_clipped_and_a_vector_is_standardised_together() -> None:
    outlier = torch.zeros(1, 6, 6)
    outlier[0, 0, 0] = 1.0
    page = activations_of(layer=outlier).grid("layer")
    assert tuple(tile_at(page, 0, 42)[0, 0]) == viridis(255)
    vector = torch.tensor([1.0, 2, 3, 6, 0])  # mean 2.4, mean of squares 10, variance 4.24
    page = activations_of(layer=vector).grid("layer")
    for index, value in enumerate(vector.tolist()[:4]):
        level = math.floor(min(255, 128 + 64 * (value - 2.4) / math.sqrt(4.24)))
        assert tuple(tile_at(page, index, 40)[0, 0]) == viridis(level)
    assert tuple(tile_at(page, 4, 40)[0, 0]) == grid.EMPTY


def test_large_maps_shrink_by_area() -> None:
    value = torch.zeros(1, 320, 320)
    value[:, :, ::2] = 1.0  # levels 64 and 192 by turns
    page = activations_of(layer=value).grid("layer")
    tile = tile_at(page, 0, 160)
    assert {tuple(pixel) for pixel in tile.reshape(-1, 3)} == {viridis(128)}


@pytest.mark.parametrize(
    ("shape", "pages", "most"),
    [
        ((2048, 7, 7), 4, 1_200_000), ((64, 250, 250), 1, 2_000_000), ((512, 1, 3000), 1, 1_100_000),
        ((1000,), 1, 400_000), ((4097,), 2, 400_000), ((401, 160, 160), 2, 11_000_000),
    ],
)  # fmt: skip
def test_the_canvas_is_bounded(shape: tuple[int, ...], pages: int, most: int) -> None:
    acts = activations_of(layer=torch.rand(*shape, generator=torch.Generator().manual_seed(0)))
    assert acts.pages("layer") == pages
    last = acts.grid("layer", pages - 1)
    assert last.width * last.height <= most
    with pytest.raises(errors.InvalidRequest, match=f"it has {pages}, counted from 0"):
        acts.grid("layer", pages)


def test_the_second_page_goes_on_where_the_first_ends() -> None:
    value = torch.rand(513, 4, 4, generator=torch.Generator().manual_seed(0))
    acts = activations_of(all=value, last=value[512:])
    assert np.array_equal(tile_at(acts.grid("all", 1), 0, 40), tile_at(acts.grid("last"), 0, 40))


def test_one_channel_is_enlarged_from_its_lowest_to_its_highest() -> None:
    acts = activations_of(layer=torch.tensor([[[2.0, 4], [3, 6]], [[1, 1], [1, 1]]]))
    pixels = np.asarray(acts.channel("layer", 0))
    top, left = 64, 12  # two lines and a border
    for (y, x), level in {(0, 0): 0, (0, 479): 128, (479, 0): 64, (479, 479): 255}.items():
        assert tuple(pixels[top + y, left + x]) == viridis(level)
    assert tuple(np.asarray(acts.channel("layer", 1))[top, left]) == grid.EMPTY
    with pytest.raises(errors.ChannelNotFound, match="layer has no channel 2: it has 0 to 1"):
        acts.channel("layer", 2)


def test_the_summary_is_paged_and_bounded_for_a_thousand_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"a$_{number}_very_long_name_of_a_layer" for number in range(1000)]
    acts = activations_of(**{name: torch.rand(3, 2, 2, generator=generator) for name in names})
    assert acts.summary_pages == 25
    for page in (0, 24):
        picture = acts.summary_picture(page)
        assert picture.width < 1600
        assert picture.height < 1700
    with pytest.raises(errors.InvalidRequest, match="no page 25"):
        acts.summary_picture(25)


# --- files ------------------------------------------------------------------------------------------------------------


def metadata_of(path: Path) -> Any:
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        return json.loads(opened.text[encode.METADATA])  # type: ignore[attr-defined]


def test_saving_writes_grids_summary_and_manifest_last(tmp_path: Path) -> None:
    model = handle(nn.Sequential(nn.Conv2d(3, 513, 3), nn.ReLU()))
    paths = activations(model, photo()).save(tmp_path / "out")
    assert [path.name for path in paths] == [
        "activations_.0.png", "activations_.0_page2.png", "activations_.1.png", "activations_.1_page2.png",
        "summary.png", "manifest.json",
    ]  # fmt: skip
    manifest = json.loads(paths[-1].read_text())
    assert manifest["model"] == "net"
    assert manifest["fingerprint"] == model.fingerprint
    assert [row["files"] for row in manifest["activations"]] == [
        ["activations_.0.png", "activations_.0_page2.png"], ["activations_.1.png", "activations_.1_page2.png"]
    ]  # fmt: skip
    metadata = metadata_of(paths[1])
    assert (metadata["layer"], metadata["page"], metadata["fingerprint"]) == (".0", 1, model.fingerprint)


def test_one_channel_is_saved_for_every_layer_or_none(tmp_path: Path, bars: list[Bar]) -> None:
    model = handle(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 3)))
    acts = activations(model, photo())
    with pytest.raises(errors.ChannelNotFound, match=r"\.0 has no channel 3"):
        acts.save(tmp_path / "none", channel=3)
    assert not (tmp_path / "none").exists()
    paths = acts.save(tmp_path, channel=1)
    assert counts(bars) == [("activations", "layers", 2, 2)]
    assert [path.name for path in paths[:2]] == ["activations_.0_channel_1.png", "activations_.1_channel_1.png"]
    assert metadata_of(paths[0])["channel"] == 1


def test_layers_that_differ_only_in_capitals_or_odd_letters_get_files_of_their_own() -> None:
    names = activations_of(**dict.fromkeys(("a/b", "a_b", "A_b"), torch.zeros(1, 2, 2))).file_names(None)
    assert len({name.lower() for name in names.values()}) == 3


def test_the_built_in_network_on_a_photo() -> None:
    model = load("builtin/vgg19")
    acts = activations(model, photo(300, 400, seed=3), "block[12]*")
    with torch.no_grad():
        image = model.preprocessing(model.fitted(photo(300, 400, seed=3))[0])
        first = model.modules["block1_conv1"](image)
    torch.testing.assert_close(acts["block1_conv1"], first[0], rtol=0, atol=0)
    rows = {row["layer"]: row for row in acts.rows()}
    assert rows["block1_relu1"]["zero"] == pytest.approx(float((first <= 0).double().mean()), abs=1e-12)
    assert rows["block2_pool"]["map"] == [56, 56]
