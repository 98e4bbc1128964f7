"""Heat maps as results: where the heat is laid on the photo, and the pictures made of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from phosphene.errors import ChannelNotFound, InvalidRequest, OutputRefused
from phosphene.images.encode import METADATA
from phosphene.images.photo import Fit, Region
from phosphene.inspection.heatmap import ClassScore, Heatmap, class_indices, probabilities

SMALL = torch.tensor([[-1.0, 2.0], [1.0, 4.0]])
WHOLE = Region(0.0, 0.0, 8.0, 12.0)


def heatmap(
    one: Tensor = SMALL, region: Region = WHOLE, size: tuple[int, int] = (8, 12), method: str = "gradcam"
) -> Heatmap:
    guess = ClassScore(3, "tiger cat", 0.375)
    return Heatmap(one, method, "conv", guess, (guess,), region, size, {"model": "m", "layer": "conv"})


def photo(height: int = 8, width: int = 12, channels: int = 3) -> Tensor:
    return torch.rand((1, channels, height, width), generator=torch.Generator().manual_seed(0))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_heat_is_what_is_positive_over_the_maximum() -> None:
    assert heatmap().heat.tolist() == [[0.0, 0.5], [0.25, 1.0]]
    assert heatmap(-SMALL).heat.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_heat_of_a_mere_gradient_is_its_size_up_to_a_percentile() -> None:
    one = torch.cat([-torch.ones(50), torch.ones(149), torch.full((1,), 100.0)]).view(10, 20)
    assert heatmap(one, method="gradient").heat.flatten().tolist() == [1.0] * 200
    assert heatmap(one, method="gradcam").heat.flatten().tolist() == pytest.approx([0.0] * 50 + [0.01] * 149 + [1.0])


def test_enlarged_over_the_whole_photo_is_bilinear() -> None:
    expected = F.interpolate(heatmap().heat[None, None], (8, 12), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(heatmap().enlarged(photo()), expected)


def test_enlarged_in_a_region_is_bilinear_there_and_nothing_outside() -> None:
    large = heatmap(region=Region(2.0, 3.0, 4.0, 6.0)).enlarged(photo())
    expected = torch.zeros(8, 12)
    expected[2:6, 3:9] = F.interpolate(heatmap().heat[None, None], (4, 6), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(large, expected)


def test_a_region_between_pixels_takes_those_whose_middle_it_holds() -> None:
    seen = heatmap(torch.ones(1, 1), Region(1.4, 2.6, 4.0, 5.0)).enlarged(photo())  # 1.4..5.4 and 2.6..7.6
    rows, columns = seen.any(1).nonzero().flatten().tolist(), seen.any(0).nonzero().flatten().tolist()
    assert (rows, columns) == ([1, 2, 3, 4], [3, 4, 5, 6, 7])


def test_a_spot_is_laid_where_the_photo_has_it() -> None:
    """A white spot goes through a network's fitting, is the map itself, and comes back to its place on the photo."""
    original = torch.zeros(1, 1, 60, 100)
    original[..., 30:34, 60:64] = 1
    image, region = Fit(40)(original, (32, 32))
    large = heatmap(image[0, 0], region, (60, 100)).enlarged(original)
    centre = (large[..., None] * torch.cartesian_prod(torch.arange(60.0), torch.arange(100.0)).view(60, 100, 2)).sum(
        (0, 1)
    ) / large.sum()
    assert centre.tolist() == pytest.approx([31.5, 61.5], abs=0.3)


def test_jet_adds_two_fifths_of_the_jet_map_in_bytes() -> None:
    image = photo()
    image[..., 0, 0] = 1.0
    heat = heatmap().enlarged(image).double().numpy()
    jet = matplotlib.colormaps["jet"](heat)[..., :3] * 255
    expected = np.clip(image[0].double().permute(1, 2, 0).numpy() * 255 + 0.4 * jet, 0, 255)
    shown = heatmap().overlay(image, "jet")
    assert shown.size == (12, 8)
    assert np.abs(pixels(shown) - expected).max() <= 0.5 + 1e-9


def test_jet_leaves_alone_what_was_not_seen() -> None:
    image = photo()
    shown = pixels(heatmap(region=Region(0, 0, 8, 6)).overlay(image, "jet"))
    assert np.array_equal(shown[:, 6:], np.rint(image[0].permute(1, 2, 0).numpy() * 255)[:, 6:])


def test_plain_covers_the_photo_more_where_it_is_hotter() -> None:
    image = torch.full((1, 3, 8, 12), 0.4)  # 102 of 255
    shown = pixels(heatmap(torch.tensor([[0.0, 1.0]])).overlay(image, legend=False))
    assert shown.shape == (8, 12, 3)
    assert shown[0, 0].tolist() == [102, 102, 102]
    hottest = np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    assert np.abs(shown[0, -1] - 255 * (0.2 * 0.4 + 0.8 * hottest)).max() <= 0.5
    difference = np.abs(shown[0].astype(int) - 102).sum(1)
    assert (np.diff(difference) >= 0).all()


def test_the_legend_lies_below_the_photo_and_covers_none_of_it() -> None:
    image = photo(200, 300)
    whole = heatmap(size=(200, 300), region=Region(0, 0, 200, 300))
    bare, full = whole.overlay(image, legend=False), whole.overlay(image)
    assert bare.size == (300, 200)
    assert full.width == 300
    assert full.height > 220
    assert np.array_equal(pixels(full)[:200], pixels(bare))
    legend = pixels(full)[200:]
    assert (legend.sum(2) == 0).sum() > 50  # letters
    assert (legend[:, -20].max(1) - legend[:, -20].min(1)).max() > 80  # the hot end of the bar


def test_captions_wrap_rather_than_run_out() -> None:
    image = photo(40, 30)
    name = ClassScore(3, "a very long name " * 5 + "w" * 80, 0.5)
    one = Heatmap(SMALL, "gradcam", "conv", name, (name,), Region(0, 0, 40, 30), (40, 30), {})
    sheet = pixels(one.overlay(image))
    assert sheet.shape[1] == 200
    assert (sheet[:, :4] == 255).all()
    assert (sheet[:, -4:] == 255).all()


def test_a_silent_map_says_so() -> None:
    one = heatmap(-SMALL.abs(), size=(100, 200), region=Region(0, 0, 100, 200))
    assert one.silent
    assert not heatmap().silent
    assert one.sentence() == "nothing speaks for tiger cat at conv"
    assert not one.enlarged(photo(100, 200)).any()
    for style in ("plain", "jet"):
        shown = pixels(one.overlay(photo(100, 200), style))
        assert shown.shape == (100, 200, 3)
        assert np.ptp(shown, axis=2).max() == 0  # grey
        assert (shown == 255).sum() > 100  # the sentence
        assert shown[45:55].mean() < 100 < shown[:20].mean()  # on a dark band
    assert pixels(one.picture()).sum() < 224 * 224 * 10


@pytest.mark.parametrize("channels", [1, 5])
def test_photos_of_other_than_three_channels_are_shown_in_grey(channels: int) -> None:
    image = photo(channels=channels)
    shown = pixels(heatmap(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).overlay(image, legend=False))
    assert shown[0, 0].tolist() == [round(255 * float(image[0, :, 0, 0].mean()))] * 3


def test_the_small_map_shows_each_cell_as_a_square() -> None:
    shown = pixels(heatmap().picture())
    assert shown.shape == (224, 224, 3)
    for row, column, heat in ((0, 0, 0.0), (0, 1, 0.5), (1, 0, 0.25), (1, 1, 1.0)):
        cell = shown[112 * row : 112 * (row + 1), 112 * column : 112 * (column + 1)].reshape(-1, 3)
        assert (cell == matplotlib.colormaps["inferno"](heat, bytes=True)[:3]).all()


def test_saved_with_all_that_made_it(tmp_path: Path) -> None:
    path = heatmap().save(tmp_path / "new/cam.png", photo(), "jet")
    saved = Image.open(path)
    assert np.array_equal(pixels(saved), pixels(heatmap().overlay(photo(), "jet")))
    told = json.loads(saved.text[METADATA])  # type: ignore[attr-defined]
    assert (told["model"], told["layer"], told["silent"]) == ("m", "conv", False)
    assert told["top"] == [{"index": 3, "name": "tiger cat", "probability": 0.375}]
    assert told["region"] == {"top": 0.0, "left": 0.0, "height": 8.0, "width": 12.0}
    shown = Image.open(io.BytesIO(heatmap()._repr_png_()))
    assert np.array_equal(pixels(shown), pixels(heatmap().picture()))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"8×12 px.*not of \(1, 3, 9, 12\)"):
        heatmap().overlay(photo(9, 12))
    with pytest.raises(InvalidRequest, match="no style 'rainbow'; there are: plain, jet"):
        heatmap().overlay(photo(), "rainbow")
    with pytest.raises(OutputRefused, match="cannot be written"):
        heatmap().save(tmp_path, photo())


def test_captions_name_class_method_and_layer() -> None:
    assert heatmap().caption() == "tiger cat 37.5% — gradcam at conv"
    assert heatmap(method="eigencam").caption() == "whatever the class — eigencam at conv"
    assert "no class" in heatmap(method="eigencam").caution
    assert heatmap().caution == ""


LABELS = ("crane", "tabby", "tiger", "tiger cat", "Crane", "great_white shark")


@pytest.mark.parametrize(
    ("target", "index"),
    [("tabby", 1), ("TABBY", 1), ("tiger", 2), ("tiger_cat", 3), ("shark", 5), ("5", 5), (0, 0), (None, 2)],
)
def test_a_class_by_index_or_name(target: int | str | None, index: int) -> None:
    assert class_indices(target, torch.tensor([[0.0, 0, 9, 0, 0, 0]]), LABELS) == [index]


def test_a_class_name_that_is_a_number_is_a_name() -> None:
    assert class_indices("1", torch.zeros(1, 3), ("2", "1", "0")) == [1]
    assert class_indices("2", torch.zeros(1, 3), ("2", "1", "0")) == [0]


@pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
        ("taby", LABELS, "no class is called 'taby'; the nearest are: tabby"),
        ("cat", ("cats", "tomcat"), "'cat' may be any of 2 classes: 0 cats, 1 tomcat"),
        ("crane", LABELS, "'crane' may be any of 2 classes: 0 crane, 4 Crane"),
        ("cat", (), "no class names to find 'cat' among; give an index, 0 to 5"),
        ("", LABELS, "no class is called ''"),
        (6, LABELS, "there is no class 6: the network has 6, 0 to 5"),
        (-1, LABELS, "there is no class -1"),
        (True, LABELS, "there is no class True"),
        ("77", LABELS, "there is no class 77"),
    ],
)
def test_a_class_that_is_none_or_several(target: int | str, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(ChannelNotFound, match=message):
        class_indices(target, torch.zeros(1, 6), labels)


def test_probabilities_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0986123]])
    torch.testing.assert_close(probabilities(logits, ()), torch.tensor([[0.25, 0.75]]))
    one = torch.tensor([[-1.0986123]])
    torch.testing.assert_close(probabilities(one, ()), torch.tensor([[0.25]]))
    torch.testing.assert_close(probabilities(one, ("cat", "dog")), torch.tensor([[0.75, 0.25]]))
    already = torch.tensor([[0.1, 0.9]])
    assert probabilities(already, ()) is already
