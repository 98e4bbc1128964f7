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

from phosphene.errors import InvalidRequest, OutputRefused
from phosphene.images.encode import METADATA
from phosphene.images.photo import Fit, Region
from phosphene.inspection.class_scores import ClassScore
from phosphene.inspection.heatmap import Heatmap

SMALL = torch.tensor([[-1.0, 2.0], [1.0, 4.0]])
WHOLE = Region(0.0, 0.0, 8.0, 12.0)


def heatmap(
    values: Tensor = SMALL, region: Region = WHOLE, size: tuple[int, int] = (8, 12), method: str = "gradcam"
) -> Heatmap:
    score = ClassScore(3, "tiger cat", 0.375)
    return Heatmap(values, method, "conv", score, (score,), region, size, {"model": "m", "layer": "conv"})


def photo(height: int = 8, width: int = 12, channels: int = 3) -> Tensor:
    return torch.rand((1, channels, height, width), generator=torch.Generator().manual_seed(0))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_heat_is_what_is_positive_over_the_maximum() -> None:
    assert heatmap().heat.tolist() == [[0.0, 0.5], [0.25, 1.0]]
    assert heatmap(-SMALL).heat.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_heat_of_a_bare_gradient_is_its_magnitude_up_to_a_percentile() -> None:
    values = torch.cat([-torch.ones(50), torch.ones(149), torch.full((1,), 100.0)]).view(10, 20)
    assert heatmap(values, method="gradient").heat.flatten().tolist() == [1.0] * 200
    assert heatmap(values, method="gradcam").heat.flatten().tolist() == pytest.approx([0.0] * 50 + [0.01] * 149 + [1.0])


def test_upsampled_over_the_whole_photo_is_bilinear() -> None:
    expected = F.interpolate(heatmap().heat[None, None], (8, 12), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(heatmap().upsampled(photo()), expected)


def test_upsampled_in_a_region_is_bilinear_there_and_nothing_outside() -> None:
    large = heatmap(region=Region(2.0, 3.0, 4.0, 6.0)).upsampled(photo())
    expected = torch.zeros(8, 12)
    expected[2:6, 3:9] = F.interpolate(heatmap().heat[None, None], (4, 6), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(large, expected)


def test_a_region_between_pixels_takes_those_whose_middle_it_holds() -> None:
    heat = heatmap(torch.ones(1, 1), Region(1.4, 2.6, 4.0, 5.0)).upsampled(photo())  # 1.4..5.4 and 2.6..7.6
    rows, columns = heat.any(1).nonzero().flatten().tolist(), heat.any(0).nonzero().flatten().tolist()
    assert (rows, columns) == ([1, 2, 3, 4], [3, 4, 5, 6, 7])


def test_a_spot_is_laid_where_the_photo_has_it() -> None:
    """A white spot goes through a network's fitting, is the map itself, and comes back to its place on the photo."""
    original = torch.zeros(1, 1, 60, 100)
    original[..., 30:34, 60:64] = 1
    image, region = Fit(40)(original, (32, 32))
    large = heatmap(image[0, 0], region, (60, 100)).upsampled(original)
    centre = (large[..., None] * torch.cartesian_prod(torch.arange(60.0), torch.arange(100.0)).view(60, 100, 2)).sum(
        (0, 1)
    ) / large.sum()
    assert centre.tolist() == pytest.approx([31.5, 61.5], abs=0.3)


def test_a_silent_map_says_so() -> None:
    silent = heatmap(-SMALL.abs(), size=(100, 200), region=Region(0, 0, 100, 200))
    assert silent.is_empty
    assert not heatmap().is_empty
    assert silent.empty_message() == "nothing speaks for tiger cat at conv"
    assert not silent.upsampled(photo(100, 200)).any()
    for style in ("plain", "jet"):
        picture = pixels(silent.overlay(photo(100, 200), style))
        assert picture.shape == (100, 200, 3)
        assert np.ptp(picture, axis=2).max() == 0  # grey
        assert (picture == 255).sum() > 100  # the sentence
        assert picture[45:55].mean() < 100 < picture[:20].mean()  # on a dark band
    assert pixels(silent.picture()).sum() < 224 * 224 * 10


def test_the_small_map_shows_each_cell_as_a_square() -> None:
    picture = pixels(heatmap().picture())
    assert picture.shape == (224, 224, 3)
    for row, column, heat in ((0, 0, 0.0), (0, 1, 0.5), (1, 0, 0.25), (1, 1, 1.0)):
        cell = picture[112 * row : 112 * (row + 1), 112 * column : 112 * (column + 1)].reshape(-1, 3)
        assert (cell == matplotlib.colormaps["inferno"](heat, bytes=True)[:3]).all()


def test_saved_with_all_that_made_it(tmp_path: Path) -> None:
    path = heatmap().save(tmp_path / "new/cam.png", photo(), "jet")
    saved = Image.open(path)
    assert np.array_equal(pixels(saved), pixels(heatmap().overlay(photo(), "jet")))
    metadata = json.loads(saved.text[METADATA])  # type: ignore[attr-defined]
    assert (metadata["model"], metadata["layer"], metadata["silent"]) == ("m", "conv", False)
    assert metadata["top"] == [{"index": 3, "name": "tiger cat", "probability": 0.375}]
    assert metadata["region"] == {"top": 0.0, "left": 0.0, "height": 8.0, "width": 12.0}
    small = Image.open(io.BytesIO(heatmap()._repr_png_()))
    assert np.array_equal(pixels(small), pixels(heatmap().picture()))


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
