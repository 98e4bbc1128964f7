"""Results: what is shown, what is written, and what the files say about themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import phosphene as ph
from phosphene.images.display import to_bytes
from phosphene.images.encode import METADATA
from phosphene.network.layers import file_prefix
from phosphene.rendering.result import Rendered


@pytest.fixture
def pictures(small_net: nn.Sequential) -> Rendered:
    model = ph.load(small_net, input_size=32)
    return ph.render(model, ph.channel("4", [6, 0, 3]), "fast", size=16, steps=3, seed=5, film=2)


def metadata_of(path: Path) -> dict[str, Any]:
    with Image.open(path) as opened:
        metadata: dict[str, Any] = json.loads(opened.text[METADATA])  # type: ignore[attr-defined]
        return metadata


def hand_made(
    display: str, images: torch.Tensor, dead: list[bool], layers: list[str], plain: list[bool] | None = None
) -> Rendered:
    count = len(images)
    return Rendered(
        images=images,
        scores=torch.arange(count),
        start_scores=torch.zeros(count),
        history=torch.zeros(1, count),
        dead=torch.tensor(dead),
        plain=torch.tensor(plain or [False] * count),
        names=tuple(f"filter_{index}" for index in range(count)),
        spec={
            "layers": layers,
            "sees": ["unknown"],
            "model": "net",
            "recipe": {**ph.RECIPES["fast"].as_dict(), "display": display},
        },
    )


def test_saving_writes_a_file_a_filter_the_grid_and_the_manifest_last(pictures: Rendered, tmp_path: Path) -> None:
    written = pictures.save(tmp_path / "new" / "folder", columns=2)
    names = ["layer_.4_filter_6.png", "layer_.4_filter_0.png", "layer_.4_filter_3.png", "grid.png", "manifest.json"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    assert written[-1].stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in written)
    for path, image in zip(written[:3], pictures.images, strict=True):
        expected = np.rint(image.clamp(0, 1).permute(1, 2, 0).numpy() * 255)
        assert np.array_equal(np.asarray(Image.open(path)), expected)
    assert np.array_equal(np.asarray(Image.open(written[3])), np.asarray(pictures.grid(columns=2)))


def test_every_png_says_how_it_was_made(pictures: Rendered, tmp_path: Path) -> None:
    written = pictures.save(tmp_path)
    for index, (path, channel) in enumerate(zip(written[:3], (6, 0, 3), strict=True)):
        metadata = metadata_of(path)
        assert (metadata["model"], metadata["layer"], metadata["channel"], metadata["seed"]) == (
            "Sequential",
            ".4",
            channel,
            5,
        )
        assert metadata["picture"] == f"filter_{channel}"
        assert metadata["score"] == pictures.scores[index].item()
        assert (metadata["dead"], metadata["plain"]) == (False, pictures.plain[index].item())
        recipe = {key: value for key, value in metadata["recipe"].items() if key != "digest"}
        again = ph.Recipe.from_json(json.dumps(recipe))
        assert again == ph.RECIPES["fast"].with_settings(size=16, steps=3, seed=5)
        assert metadata["recipe"]["digest"] == again.digest
    grid = metadata_of(written[3])
    assert grid["objective"] == {"objective": "channel", "layer": "4", "channels": [6, 0, 3]}
    assert (grid["recipe"], grid["fingerprint"]) == (metadata["recipe"], metadata["fingerprint"])


def test_the_manifest_lists_every_file_with_its_scores(pictures: Rendered, tmp_path: Path) -> None:
    pictures.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["grid"] == "grid.png"
    assert [entry["file"] for entry in manifest["pictures"]] == [
        f"layer_.4_filter_{channel}.png" for channel in (6, 0, 3)
    ]
    assert [entry["score"] for entry in manifest["pictures"]] == pictures.scores.tolist()
    assert [entry["start_score"] for entry in manifest["pictures"]] == pictures.start_scores.tolist()
    assert {key: manifest[key] for key in pictures.spec} == json.loads(json.dumps(dict(pictures.spec)))


def test_a_folder_that_cannot_be_written_is_refused(pictures: Rendered, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ph.errors.OutputRefused, match="cannot be written"):
        pictures.save(tmp_path / "file" / "folder")


def test_the_display_rule_is_the_recipes() -> None:
    images = torch.tensor([[[[-0.5, 0.0], [0.5, 1.5]]]])
    displayed = {
        name: hand_made(name, images, [False], ["a"]).displayed()[0, 0].tolist() for name in ("clip", "stretch")
    }
    assert displayed == {"clip": [[0, 0], [128, 255]], "stretch": [[0, 64], [128, 255]]}


def test_dead_pictures_are_crossed_in_the_grid_and_plain_alone() -> None:
    images = torch.full((2, 3, 40, 40), 200 / 255)
    result = hand_made("clip", images, [False, True], ["a"])
    sheet = result.grid(captions=False)
    assert sheet.size == (85, 40)
    assert [sheet.getpixel((20, 5)), sheet.getpixel((45 + 20, 5))] == [(200, 200, 200), (60, 60, 60)]
    assert result.pictures[1].getpixel((20, 5)) == (200, 200, 200)
    assert repr(result) == "Rendered(2 pictures of 3×40×40, 1 dead, 0 plain, recipe fast)"
    assert len(result) == 2


def test_a_film_shows_the_grids_of_its_moments(pictures: Rendered, tmp_path: Path) -> None:
    path = pictures.save_film(tmp_path / "film.gif")
    with Image.open(path) as opened:
        assert opened.n_frames == len(pictures.moments) == 3
        opened.seek(2)
        last = np.asarray(opened.convert("RGB")).astype(int)
    assert abs(last - np.asarray(pictures.grid()).astype(int)).mean() < 8  # 256 colours
    assert torch.equal(to_bytes(pictures.moments[-1]), pictures.displayed())


def test_without_moments_there_is_no_film(tmp_path: Path) -> None:
    result = hand_made("clip", torch.zeros(1, 1, 2, 2), [False], ["a"])
    with pytest.raises(ph.errors.InvalidRequest, match="render with film=24"):
        result.save_film(tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_the_grid(pictures: Rendered) -> None:
    with Image.open(io.BytesIO(pictures._repr_png_())) as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(pictures.grid()))


@pytest.mark.parametrize(
    ("layers", "prefix"),
    [
        (["block3_conv1"], "layer_block3_conv1"),
        (["features.28"], "layer_features.28"),
        (["base/block5_conv3"], "layer_base_block5_conv3"),
        (["conv@1", "head#logits"], "layer_conv@1_head#logits"),
        ([""], "layer_output"),
        (["a b:c\\d\n"], "layer_a_b_c_d_"),
    ],
)
def test_file_names_are_made_of_the_layer(layers: list[str], prefix: str) -> None:
    assert file_prefix(layers) == prefix
