"""The plan of an atlas: which jobs it has, and what their identity is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from phosphene import errors
from phosphene.atlases.plan import Job, atlas
from phosphene.network.loading import load
from phosphene.network.model import Model
from phosphene.rendering.recipes import RECIPES
from phosphene.version import PICTURES_VERSION
from tiny_atlas import tiny, tiny_atlas, tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def test_every_filter_of_every_convolution_is_in_one_job(model: Model) -> None:
    plan = atlas(model, per_job=4)
    assert [(job.layer, job.channels) for job in plan.jobs] == [
        (".0", (0, 1, 2, 3)),
        (".0", (4, 5)),
        (".2", (0, 1, 2, 3)),
        (".2", (4, 5, 6, 7)),
    ]
    assert (plan.filters, [layer.path for layer in plan.layers]) == (14, [".0", ".2"])
    assert plan.jobs[1].pictures == ("filter_4", "filter_5")
    assert repr(plan) == "Atlas(14 filters of 2 layers of Sequential, 4 jobs)"


def test_a_job_is_named_after_its_whole_spec(model: Model) -> None:
    job = tiny_atlas(model).jobs[1]
    spec = {
        "model": "Sequential",
        "fingerprint": model.fingerprint,
        "input_size": [24, 24],
        "layer": ".0",
        "channels": [4, 5],
        "recipe": RECIPES["fourier"].with_settings(steps=3).digest,
        "size": 16,
        "precision": "fp32",
        "versions": {"torch": torch.__version__, "pictures": PICTURES_VERSION},
    }
    assert job.spec == spec
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()
    assert job.digest == hashlib.sha256(canonical).hexdigest()[:32]
    assert pickle.loads(pickle.dumps(job)).digest == job.digest


CHANGES: dict[str, Any] = {
    "model": "Other",
    "fingerprint": "0" * 16,
    "input_size": (24, 25),
    "layer": ".2",
    "channels": (5, 4),
    "recipe": RECIPES["fourier"],
    "size": None,
    "precision": "bf16",
    "versions": (torch.__version__, PICTURES_VERSION + 1),
    "facets": 2,
    "opposite": True,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Job)])
def test_whatever_changes_a_picture_changes_the_name(model: Model, name: str) -> None:
    job = tiny_atlas(model).jobs[1]
    assert dataclasses.replace(job, **{name: CHANGES[name]}).digest != job.digest


def test_what_a_recipe_is_called_does_not(model: Model) -> None:
    job = tiny_atlas(model).jobs[1]
    renamed = dataclasses.replace(job.recipe, name="mine", source="told otherwise")
    assert dataclasses.replace(job, recipe=renamed).digest == job.digest


def test_weights_that_differ_by_one_bit_are_another_model() -> None:
    net = tiny()
    before = {job.digest for job in tiny_atlas(load(net, input_size=24)).jobs}
    bits = cast(Tensor, net[0].weight).data.view(torch.int32)
    bits[5, 2, 1, 1] ^= 1
    assert not before & {job.digest for job in tiny_atlas(load(net, input_size=24)).jobs}
    bits[5, 2, 1, 1] ^= 1
    assert before == {job.digest for job in tiny_atlas(load(net, input_size=24)).jobs}


def test_planning_is_pure(
    untouched: Callable[[nn.Module], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = tiny()
    handle = load(net, input_size=24)
    with untouched(net):
        assert atlas(handle).jobs == atlas(handle).jobs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        (0, [".0"]),
        (".2", [".2"]),
        ([1, "0"], [".0", ".2"]),
        ([".0", "*"], [".0", ".2"]),
        (".1", [".1"]),
        (".[13]", [".1", ".3"]),  # it names no convolution, so the ReLUs are meant
        (".[12]", [".2"]),
    ],
)
def test_layers(model: Model, layers: Any, paths: list[str]) -> None:
    plan = atlas(model, layers)
    assert [layer.path for layer in plan.layers] == paths
    assert list(dict.fromkeys(job.layer for job in plan.jobs)) == paths


@pytest.mark.parametrize(
    ("channels", "by_path"),
    [
        ("all", {".0": range(6), ".2": range(8)}),
        ("0:7", {".0": range(6), ".2": range(7)}),
        ("7,2", {".0": (2,), ".2": (7, 2)}),
        ([6], {".2": (6,)}),
    ],
)
def test_of_the_channels_each_layer_gives_those_that_it_has(
    model: Model, channels: Any, by_path: dict[str, Any]
) -> None:
    plan = atlas(model, channels=channels)
    assert {job.layer: job.channels for job in plan.jobs} == {path: tuple(numbers) for path, numbers in by_path.items()}
    assert [layer.path for layer in plan.layers] == list(by_path)


def test_further_seeds_are_jobs_of_their_own(model: Model) -> None:
    plan = atlas(model, 0, seed=7, seeds=2, per_job=3)
    assert [(job.recipe.seed, job.channels) for job in plan.jobs] == [
        (7, (0, 1, 2)),
        (7, (3, 4, 5)),
        (8, (0, 1, 2)),
        (8, (3, 4, 5)),
    ]
    assert plan.filters == 6
    assert plan.jobs_of(plan.layers[0]) == plan.jobs[:2]
    assert plan.jobs_of(plan.layers[0], seed=1) == plan.jobs[2:]
    assert plan.jobs[:2] == atlas(model, 0, seed=7, per_job=3).jobs


def test_facets_are_in_the_jobs_of_the_first_seed_and_opposites_in_jobs_of_their_own(model: Model) -> None:
    plan, plain = atlas(model, 0, seeds=2, facets=3, opposite=True), atlas(model, 0, seeds=2)
    assert [(job.recipe.seed, job.facets, job.opposite) for job in plan.jobs] == [
        (0, 3, False),
        (1, 1, False),
        (0, 1, True),
    ]
    assert plan.jobs[0].spec == {**plain.jobs[0].spec, "facets": 3}
    assert plan.jobs[2].spec == {**plain.jobs[0].spec, "opposite": True}
    assert plan.jobs[1].digest == plain.jobs[1].digest  # which an earlier store has already
    assert [plan.jobs_of(plan.layers[0]), plan.jobs_of(plan.layers[0], opposite=True)] == [plan.jobs[:1], plan.jobs[2:]]
    assert plan.filters == 6
    assert plan.jobs[0].pictures[:4] == ("filter_0", "filter_0_facet_1", "filter_0_facet_2", "filter_1")
    assert plan.jobs[2].pictures[:2] == ("filter_0_opposite", "filter_1_opposite")
    with pytest.raises(errors.InvalidRequest, match="facets is a whole number"):
        atlas(model, 0, facets=0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"layers": "block*"}, errors.LayerNotFound, "no layer matches 'block*'; the nearest are: .0, .1, .2, .3"),
        ({"layers": []}, errors.LayerRefused, "nothing names no layer"),
        ({"channels": "0:9"}, errors.ChannelNotFound, "there is no channel 8: the layer has 0 to 7"),
        ({"channels": []}, errors.InvalidRequest, "channels are given as 0:64, 3,7,11 or all, not ''"),
        ({"recipe": "oil"}, errors.RecipeNotFound, "there is no recipe 'oil'"),
        ({"size": 0}, errors.InvalidRequest, "a picture is at least 1 px wide, not 0"),
        ({"precision": "fp8"}, errors.InvalidRequest, "precision is fp32, bf16 or auto, not 'fp8'"),
        ({"per_job": 0}, errors.InvalidRequest, "per_job is a whole number of at least 1, not 0"),
        ({"seeds": True}, errors.InvalidRequest, "seeds is a whole number of at least 1, not True"),
    ],
)
def test_what_cannot_be_planned(
    model: Model, options: dict[str, Any], error: type[errors.PhospheneError], text: str
) -> None:
    with pytest.raises(error) as caught:
        atlas(model, **options)
    assert text in str(caught.value)


def test_a_layer_without_maps_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4)).eval()
    with pytest.raises(
        errors.LayerRefused, match=r"'\.2' names no layer that returns maps of channels; `phosphene layers` lists"
    ):
        atlas(load(net, input_size=8), ".2")
