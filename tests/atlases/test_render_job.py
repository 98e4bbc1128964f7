"""Rendering one job: its files, its manifest, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import cast

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
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.objectives import channel
from phosphene.rendering.render import render
from tiny_atlas import tiny, tiny_atlas, tiny_model


@pytest.fixture
def model() -> Model:
    return tiny_model()


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_the_files_are_what_render_makes(model: Model) -> None:
    job = tiny_atlas(model, seed=5).jobs[1]
    files, manifest = render_job(model, job)
    rendered = render(model, channel(".0", [4, 5]), "fourier", size=16, steps=3, seed=5, precision="fp32")
    data = ["figures.safetensors", "film.webp", "measures.safetensors"]
    assert sorted(files) == sorted([*data, "filter_4.png", "filter_5.png"])
    figures = safetensors.torch.load(files["figures.safetensors"])
    assert sorted(figures) == ["dead", "history", "plain", "scores", "start_scores"]
    for name, tensor in figures.items():
        assert torch.equal(tensor, getattr(rendered, name)), name
    for index, name in enumerate(("filter_4", "filter_5")):
        with Image.open(io.BytesIO(files[f"{name}.png"])) as image:
            assert np.array_equal(np.asarray(image), rendered.displayed()[index].permute(1, 2, 0).numpy())
            about = json.loads(image.text["phosphene"])  # type: ignore[attr-defined]
        score = float(rendered.scores[index])
        assert about["plain"] == bool(rendered.plain[index])
        assert (about["model"], about["layer"], about["channel"], about["seed"]) == ("Sequential", ".0", 4 + index, 5)
        assert (about["score"], about["recipe"]["steps"], about["size"], about["dead"]) == (score, 3, [16, 16], False)
        assert manifest["pictures"][index] == {
            "file": f"{name}.png",
            "picture": name,
            "channel": 4 + index,
            "score": score,
            "start_score": float(rendered.start_scores[index]),
            "dead": False,
            "plain": bool(rendered.plain[index]),
        }
    assert {name: manifest[name] for name in ("layer", "channels", "fingerprint", "precision")} == {
        "layer": ".0",
        "channels": [4, 5],
        "fingerprint": model.fingerprint,
        "precision": "fp32",
    }


def test_a_job_of_facets_has_all_pictures_and_the_numbers_of_the_filters_own(model: Model) -> None:
    faceted, plain = (tiny_atlas(model, facets=facets).jobs[1] for facets in (3, 1))
    files, manifest = render_job(model, faceted)
    plain_files, plain_manifest = render_job(model, plain)
    assert set(files) - set(plain_files) == {f"filter_{k}_facet_{facet}.png" for k in (4, 5) for facet in (1, 2)}
    for name in ("figures.safetensors", "measures.safetensors", "film.webp"):
        assert files[name] == plain_files[name], name
    rendered = render(model, channel(".0", [4, 5]), "fourier", size=16, steps=3, precision="fp32", facets=3)
    for row, plain_row, first in zip(manifest["pictures"], plain_manifest["pictures"], (0, 3), strict=True):
        further = row.pop("facets")
        assert row == plain_row
        assert [facet["file"] for facet in further] == [f"{rendered.names[first + k]}.png" for k in (1, 2)]
        assert [facet["score"] for facet in further] == rendered.scores[first + 1 : first + 3].tolist()
        assert [facet["channel"] for facet in further] == [row["channel"]] * 2
    with Image.open(io.BytesIO(files["filter_5_facet_2.png"])) as image:
        assert np.array_equal(np.asarray(image), rendered.displayed()[5].permute(1, 2, 0).numpy())


def test_a_job_of_opposites_is_not_judged(model: Model) -> None:
    job = tiny_atlas(model, opposite=True).jobs[3]
    files, manifest = render_job(model, job)
    names = ["filter_4_opposite", "filter_5_opposite"]
    assert sorted(files) == ["figures.safetensors", *(f"{name}.png" for name in names)]
    assert manifest["opposite"] is True
    assert [row["picture"] for row in manifest["pictures"]] == names
    for row in manifest["pictures"]:
        assert row["score"] < row["start_score"]


def test_the_pictures_are_measured_as_they_are_saved(model: Model) -> None:
    job = tiny_atlas(model).jobs[1]
    files, _ = render_job(model, job)
    measures = safetensors.torch.load(files["measures.safetensors"])
    saved = [np.array(Image.open(io.BytesIO(files[f"filter_{number}.png"]))) for number in (4, 5)]
    images = torch.from_numpy(np.stack(saved)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = cast(nn.Sequential, model.module)[0](images).mean((2, 3))
        grey = cast(nn.Sequential, model.module)[0](torch.full((1, 3, 16, 16), 0.5)).mean((2, 3))[0]
    assert measures["plain"].dtype == torch.float32
    assert torch.allclose(measures["plain"], expected, atol=1e-6)
    assert torch.allclose(measures["grey"], grey, atol=1e-6)
    expected_moves = measure(model, ".0", (images * 255).round().to(torch.uint8), None, torch.tensor([4, 5])).moved
    assert torch.equal(measures["moved"], expected_moves)


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
        "input size have changed; plan the atlas again"
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
