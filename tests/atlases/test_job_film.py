"""The film of a job: which moments it has, and what its tiles show."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phosphene.atlases.job_film import kept_steps
from phosphene.atlases.render_job import render_job
from phosphene.images.display import DISPLAYS, to_bytes
from phosphene.images.encode import png
from phosphene.images.grid import picture
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.gradient_ascent import Frame
from tiny_atlas import tiny_atlas, tiny_model


@pytest.fixture
def model() -> Model:
    return tiny_model()


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the film written so that its pixels can be compared."""
    monkeypatch.setattr("phosphene.atlases.job_film.webp", lambda image, quality: png(image, {}))


@pytest.mark.parametrize(("steps", "kept"), [(1, {0, 1}), (4, {0, 1, 2, 3, 4}), (49, {0, 1, 4, 9, 16, 25, 36, 49})])
def test_steps_of_a_film_are_squares(steps: int, kept: set[int]) -> None:
    assert kept_steps(steps) == kept


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
    small = picture(to_bytes(DISPLAYS["clip"](image[None]))[0]).convert("RGB")
    return np.asarray(small.resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("steps", "size", "kept"), [(20, 96, [0, 2, 4, 7, 10, 15, 20]), (3, 16, [0, 1, 2, 3]), (7, 80, [0, 1, 2, 4, 5, 7])]
)
def test_the_film_is_the_climb_in_small(model: Model, lossless: None, steps: int, size: int, kept: list[int]) -> None:
    job = tiny_atlas(model, steps=steps, size=size).jobs[1]
    frames: list[Frame] = []
    files, manifest = render_job(model, job, lambda frame: frames.append(frame._replace(image=frame.image.clone())))
    assert [frame.step for frame in frames] == list(range(steps + 1))  # who else watches sees all
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
    monkeypatch.setattr(sys.modules["phosphene.atlases.render_job"], "AT_ONCE", 1)  # the module, not the function
    job = tiny_atlas(model, recipe="multi-scale", size=70, steps=2).jobs[1]
    frames: dict[tuple[int, int], Tensor] = {}
    files, manifest = render_job(
        model, job, lambda frame: frames.update({(int(frame.items), frame.step): frame.image[0].clone()})
    )
    assert len({image.shape for image in frames.values()}) == len(job.recipe.sizes) > 1
    kept = manifest["film"]["steps"]
    assert kept == [0, 2, 4, 8, 12, 18, 24]  # 24 · (k / 7)², rounded
    assert manifest["film"]["tile"] == [64, 64]
    display = DISPLAYS[job.recipe.display]
    for index, row in enumerate(tiles_of(files["film.webp"], manifest["film"])):
        for tile, step in zip(row, kept, strict=True):
            small = picture(to_bytes(display(frames[index, step][None]))[0])
            if max(small.size) > 64:
                small = small.resize((64, 64), Image.Resampling.LANCZOS)
            assert np.array_equal(tile, np.asarray(small.resize((64, 64), Image.Resampling.LANCZOS))), (index, step)


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
    monkeypatch.setattr("phosphene.atlases.job_film.MAX_SIDE", 11)
    files, manifest = render_job(model, job)
    assert manifest["film"]["tile"] == [5, 5]
    assert Image.open(io.BytesIO(files["film.webp"])).size == (20, 10)
    monkeypatch.setattr("phosphene.atlases.job_film.MAX_SIDE", 1)
    files, manifest = render_job(model, job)
    assert (sorted({*whole[0]} - {*files}), sorted({*whole[1]} - {*manifest})) == (["film.webp"], ["film"])
    assert all(whole[0][name] == content for name, content in files.items())
