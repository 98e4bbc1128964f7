"""Working off one job."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene import errors
from phosphene.atlases.plan import atlas
from phosphene.atlases.render_job import one_thread, picture_size, render_job
from phosphene.atlases.verdicts import measure
from phosphene.images.display import DISPLAYS, to_bytes
from phosphene.images.encode import png
from phosphene.images.grid import picture
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.gradient_ascent import Frame
from phosphene.rendering.objectives import channel
from phosphene.rendering.render import render
from tiny_atlas import tiny, tiny_atlas, tiny_model


@pytest.fixture
def model() -> Model:
    return tiny_model()


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the film written so that its pixels can be compared."""
    monkeypatch.setattr(sys.modules["phosphene.atlases.render_job"], "webp", lambda image, quality: png(image, {}))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_files_are_what_render_makes(model: Model) -> None:
    job = tiny_atlas(model, seed=5).jobs[1]
    files, manifest = render_job(model, job)
    rendered = render(model, channel(".0", [4, 5]), "fourier", size=16, steps=3, seed=5, precision="fp32")
    others = ["figures.safetensors", "film.webp", "measures.safetensors"]
    assert sorted(files) == sorted([*others, "filter_4.png", "filter_5.png"])
    figures = safetensors.torch.load(files["figures.safetensors"])
    assert sorted(figures) == ["dead", "history", "scores", "start_scores"]
    for name, tensor in figures.items():
        assert torch.equal(tensor, getattr(rendered, name)), name
    for index, name in enumerate(("filter_4", "filter_5")):
        with Image.open(io.BytesIO(files[f"{name}.png"])) as image:
            assert np.array_equal(np.asarray(image), rendered.displayed()[index].permute(1, 2, 0).numpy())
            told = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
        score = float(rendered.scores[index])
        assert (told["model"], told["layer"], told["channel"], told["seed"]) == ("Sequential", ".0", 4 + index, 5)
        assert (told["score"], told["recipe"]["steps"], told["size"], told["dead"]) == (score, 3, [16, 16], False)
        assert manifest["pictures"][index] == {
            "file": f"{name}.png",
            "picture": name,
            "channel": 4 + index,
            "score": score,
            "start_score": float(rendered.start_scores[index]),
            "dead": False,
        }
    assert {name: manifest[name] for name in ("layer", "channels", "fingerprint", "precision")} == {
        "layer": ".0",
        "channels": [4, 5],
        "fingerprint": model.fingerprint,
        "precision": "fp32",
    }


def test_the_pictures_are_measured_as_they_are_saved(model: Model) -> None:
    job = tiny_atlas(model).jobs[1]
    files, _ = render_job(model, job)
    found = safetensors.torch.load(files["measures.safetensors"])
    saved = [np.array(Image.open(io.BytesIO(files[f"filter_{number}.png"]))) for number in (4, 5)]
    images = torch.from_numpy(np.stack(saved)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = cast(nn.Sequential, model.module)[0](images).mean((2, 3))
        grey = cast(nn.Sequential, model.module)[0](torch.full((1, 3, 16, 16), 0.5)).mean((2, 3))[0]
    assert found["plain"].dtype == torch.float32
    assert torch.allclose(found["plain"], expected, atol=1e-6)
    assert torch.allclose(found["grey"], grey, atol=1e-6)
    expected_moves = measure(model, ".0", (images * 255).round().to(torch.uint8), None, torch.tensor([4, 5])).moved
    assert torch.equal(found["moved"], expected_moves)


# --- film -------------------------------------------------------------------------------------------------------------


def tiles_of(content: bytes, film: Mapping[str, Any]) -> list[list[np.ndarray[Any, Any]]]:
    """Return the tiles of a film, row by row."""
    (width, height), columns = film["tile"], film["columns"]
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == columns * width
    return [
        [pixels[top : top + height, column * width :][:, :width] for column in range(columns)]
        for top in range(0, len(pixels), height)
    ]


def in_small(image: Tensor, side: int) -> np.ndarray[Any, Any]:
    """Return an image (c, h, w) as it is in a film: displayed as `fourier` does, at the side of a tile."""
    shown = picture(to_bytes(DISPLAYS["clip"](image[None]))[0]).convert("RGB")
    return np.asarray(shown.resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("steps", "size", "kept"), [(20, 96, [0, 2, 4, 7, 10, 15, 20]), (3, 16, [0, 1, 2, 3]), (7, 80, [0, 1, 2, 4, 5, 7])]
)
def test_the_film_is_the_climb_in_small(model: Model, lossless: None, steps: int, size: int, kept: list[int]) -> None:
    job = tiny_atlas(model, steps=steps, size=size).jobs[1]
    frames: list[Frame] = []
    files, manifest = render_job(model, job, lambda one: frames.append(one._replace(image=one.image.clone())))
    assert [one.step for one in frames] == list(range(steps + 1))  # who else watches sees all
    side = min(64, size)
    assert manifest["film"] == {"file": "film.webp", "tile": [side, side], "columns": len(kept), "steps": kept}
    rows = tiles_of(files["film.webp"], manifest["film"])
    assert len(rows) == 2
    for index, row in enumerate(rows):
        for tile, step in zip(row, kept, strict=True):
            assert np.array_equal(tile, in_small(frames[step].image[index], side)), (index, step)
        with Image.open(io.BytesIO(files[f"filter_{4 + index}.png"])) as saved:
            assert np.array_equal(row[-1], np.asarray(saved.resize((side, side), Image.Resampling.LANCZOS)))


def test_the_film_goes_through_all_scales_and_batches(
    model: Model, lossless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["phosphene.atlases.render_job"], "AT_ONCE", 1)
    job = tiny_atlas(model, recipe="multi-scale", size=70, steps=2).jobs[1]
    frames: dict[tuple[int, int], Tensor] = {}
    files, manifest = render_job(
        model, job, lambda one: frames.update({(int(one.items), one.step): one.image[0].clone()})
    )
    assert len({one.shape for one in frames.values()}) == len(job.recipe.sizes) > 1
    kept = manifest["film"]["steps"]
    assert kept == [0, 2, 4, 8, 12, 18, 24]  # 24 · (k / 7)², rounded
    assert manifest["film"]["tile"] == [64, 64]
    display = DISPLAYS[job.recipe.display]
    for index, row in enumerate(tiles_of(files["film.webp"], manifest["film"])):
        for tile, step in zip(row, kept, strict=True):
            shown = picture(to_bytes(display(frames[index, step][None]))[0])
            if max(shown.size) > 64:
                shown = shown.resize((64, 64), Image.Resampling.LANCZOS)
            assert np.array_equal(tile, np.asarray(shown.resize((64, 64), Image.Resampling.LANCZOS))), (index, step)


@pytest.mark.parametrize(("channels", "size"), [(1, (16, 16)), (5, (48, 32))])  # five: a block of grey tiles
def test_the_film_of_networks_that_see_other_than_colour(channels: int, size: tuple[int, int], lossless: None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = load(nn.Sequential(nn.Conv2d(channels, 2, 3)), input_size=24, channels_in=channels)
    files, manifest = render_job(net, tiny_atlas(net).jobs[0])
    assert manifest["film"]["tile"] == list(size)
    for number, row in enumerate(tiles_of(files["film.webp"], manifest["film"])):
        with Image.open(io.BytesIO(files[f"filter_{number}.png"])) as saved:
            assert np.array_equal(row[-1], np.asarray(saved.convert("RGB")))


def test_what_webp_cannot_hold_gets_smaller_tiles_or_no_film(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_atlas(model).jobs[1]
    whole = render_job(model, job)
    monkeypatch.setattr(sys.modules["phosphene.atlases.render_job"], "SIDE", 11)
    files, manifest = render_job(model, job)
    assert manifest["film"]["tile"] == [5, 5]
    assert Image.open(io.BytesIO(files["film.webp"])).size == (20, 10)
    monkeypatch.setattr(sys.modules["phosphene.atlases.render_job"], "SIDE", 1)
    files, manifest = render_job(model, job)
    assert (sorted({*whole[0]} - {*files}), sorted({*whole[1]} - {*manifest})) == (["film.webp"], ["film"])
    assert all(whole[0][name] == content for name, content in files.items())


# --- what the bytes follow from ---------------------------------------------------------------------------------------


def test_the_bytes_are_the_same_whatever_the_threads(model: Model, two_threads: None) -> None:
    job = tiny_atlas(model).jobs[2]
    here = render_job(model, job)
    assert torch.get_num_threads() == 2
    with one_thread():
        assert render_job(model, job) == here


def test_the_threads_are_given_back_after_an_error(two_threads: None) -> None:
    fixed = load(Fixed(), input_size=8)
    with pytest.raises(errors.SizeRefused):
        render_job(fixed, tiny_atlas(fixed, size=9).jobs[0])
    assert torch.get_num_threads() == 2


class Fixed(nn.Module):
    """A network that takes pictures of 8 px only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        with torch.no_grad():
            self.conv.weight.fill_(0.1)

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] == 8, "8 px, please"
        result: Tensor = self.conv(image)
        return result


def test_a_network_that_has_changed_is_refused() -> None:
    net = tiny()
    handle = load(net, input_size=24)
    job = tiny_atlas(handle).jobs[0]
    before = handle.fingerprint
    with torch.no_grad():
        cast(Tensor, net[2].bias)[0] += 1e-3
    with pytest.raises(errors.ModelRefused) as caught:
        render_job(handle, job)
    after = handle.fingerprint
    assert str(caught.value) == (
        f"Sequential is now {after} at 24×24 px, the atlas was planned for {before} at 24×24 px: its weights or its "
        "input size are others; plan the atlas anew"
    )


def test_another_torch_is_refused(model: Model) -> None:
    job = dataclasses.replace(tiny_atlas(model).jobs[0], versions=("1.0", 1))
    with pytest.raises(errors.ModelRefused, match=r"planned with torch 1\.0 and pictures 1, this worker has"):
        render_job(model, job)


def test_the_size_of_the_pictures_is_known_before() -> None:
    free, fixed = tiny_model(), load(Fixed(), input_size=8)
    assert picture_size(free, atlas(free).jobs[0]) == (48, 48)  # twice the network's input
    assert picture_size(free, atlas(free, size=20).jobs[0]) == (20, 20)
    assert picture_size(fixed, atlas(fixed, steps=2).jobs[0]) == (8, 8)
    assert render_job(fixed, atlas(fixed, steps=2).jobs[0])[1]["size"] == [8, 8]
