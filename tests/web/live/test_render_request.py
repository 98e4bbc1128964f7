"""What may be requested of a render, and what is left open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_render_queue import atlas_id, reader
from torch import nn

from phosphene.atlases.run import run
from phosphene.errors import (
    InvalidRequest,
    LayerRefused,
)
from phosphene.network.loading import load
from phosphene.rendering.recipes import RECIPES
from phosphene.storage.store import open_store
from phosphene.web.live import render_queue as render_queue
from phosphene.web.live.render_request import RenderRequest, channel_count, recipe_choices, render_response
from phosphene.web.store_reader import StoreReader
from tiny_atlas import InProcessRunner, tiny_atlas, tiny_model

__all__ = ["atlas_id", "reader"]


def test_a_layer_without_maps_has_no_filters() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(LayerRefused, match="returns no map of channels; choose a convolution"):
        channel_count(load(net, input_size=8), ".3")


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        "layer",
        {},
        {"layer": ".0"},
        {"channel": 1},
        {"layer": ".0", "channel": 1, "batch": 9},
        {"layer": 0, "channel": 1},
        {"layer": ".0", "channel": "1"},
        {"layer": ".0", "channel": None},
        {"layer": ".0", "channel": True},
        {"layer": ".0", "channel": -1},
        {"layer": ".0", "channel": 1.5},
        {"layer": ".0", "channel": float("nan")},
        {"layer": ".0", "channel": 1, "recipe": 7},
        {"layer": ".0", "channel": 1, "size": 15},
        {"layer": ".0", "channel": 1, "size": 513},
        {"layer": ".0", "channel": 1, "steps": 0},
        {"layer": ".0", "channel": 1, "steps": 2049},
        {"layer": ".0", "channel": 1, "seed": -1},
        {"layer": ".0", "channel": 1, "seed": 10**400},
    ],
)
def test_a_wish_that_makes_no_sense_is_refused_in_a_sentence(given: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RenderRequest.from_json(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_is_left_open_is_as_in_the_atlas(reader: StoreReader, atlas_id: str) -> None:
    facts = reader.atlas(atlas_id)
    recipe, size = RenderRequest.from_json({"layer": ".0", "channel": 0}).settings(facts)
    assert (recipe.name, recipe.steps, recipe.seed, size) == ("fast", 3, 0, 16)
    recipe, size = RenderRequest.from_json(
        {"layer": ".0", "channel": 0, "recipe": "fast", "steps": 9, "seed": 4}
    ).settings(facts)
    assert (recipe.digest, size) == (RECIPES["fast"].with_settings(steps=9, seed=4).digest, 16)
    recipe, size = RenderRequest.from_json({"layer": ".0", "channel": 0, "recipe": "rms", "steps": None}).settings(
        facts
    )
    assert (recipe, size) == (RECIPES["rms"], None)


def test_the_recipes_to_choose_from_are_told_with_their_settings(reader: StoreReader, atlas_id: str) -> None:
    choices = json.loads(json.dumps(recipe_choices(reader.atlas(atlas_id))))
    assert choices["own"] == "fast"
    assert choices["recipes"]["fast"] == {"size": 16, "steps": 3, "seed": 0}
    assert set(choices["recipes"]) == set(RECIPES)
    assert choices["recipes"]["rms"] == {"size": 150, "steps": 40, "seed": 0}


def test_a_recipe_without_a_name_has_no_command(tmp_path: Path, shown_bars: list[str]) -> None:
    model = tiny_model()
    recipe = replace(RECIPES["fast"].with_settings(16, 3), blur=3, name="mine")
    run(tiny_atlas(model, recipe=recipe), tmp_path, InProcessRunner(), progress=False)
    ((_, facts),) = StoreReader([open_store(tmp_path)]).atlases()
    done = render_response(model, facts, RenderRequest(".0", 0), lambda *_: None)
    assert done["command"] == ""
    assert shown_bars == []  # in the terminal of the server
    named = render_response(model, facts, RenderRequest(".0", 0, "fast", 16, 3), lambda *_: None)
    assert named["command"].startswith("phosphene filters Sequential .0 --channels 0 --recipe fast --size 16 --steps 3")
