"""Recipes: values that survive JSON, and requests that are refused before any work."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import phosphene as ph
from phosphene.errors import InvalidRequest, RecipeNotFound
from phosphene.rendering.recipes import DEFAULT, RECIPES, Recipe, choice, find_recipe, growing


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str) -> None:
    recipe = RECIPES[name]
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.digest == recipe.digest
    assert recipe.name == name
    assert recipe.source


def test_the_digest_is_of_what_changes_pictures() -> None:
    recipe = RECIPES["fourier"]
    assert dataclasses.replace(recipe, name="mine", source="me").digest == recipe.digest
    changes: list[dict[str, Any]] = [
        {"sizes": (64,)},
        {"steps": 7},
        {"seed": 1},
        {"display": "stretch"},
        {"blur": 3},
        {"weight_decay": 1e-6},
        {"cooldown": 0.5},
        {"transforms": ()},
        {"step_rule": choice("adam", rate=0.05)},
        {"parameterization": choice("fourier", decay=1.5)},
    ]
    digests = {dataclasses.replace(recipe, **change).digest for change in changes}
    assert len(digests | {recipe.digest}) == len(changes) + 1


def test_the_order_of_options_does_not_matter() -> None:
    assert choice("affine", pixels=1.0, scale=0.1) == choice("affine", scale=0.1, pixels=1.0)


def test_at_scales_a_whole_schedule() -> None:
    recipe = RECIPES["multi-scale"]
    assert recipe.size == 408
    half = recipe.with_settings(size=204)
    assert half.sizes == (28, 34, 40, 48, 58, 69, 82, 99, 118, 142, 170, 204)
    assert half.steps == recipe.steps
    assert recipe.with_settings() == recipe
    assert recipe.with_settings(steps=3, seed=9) == dataclasses.replace(recipe, steps=3, seed=9)
    assert recipe.with_settings(size=1).sizes == (1,) * 12


def test_updates_shrink_evenly_over_the_cooldown() -> None:
    recipe = RECIPES["fourier"].with_settings(steps=8)
    factors = {0.0: [1.0] * 8, 0.5: [1.0] * 5 + [0.75, 0.5, 0.25], 1.0: [1 - step / 8 for step in range(8)]}
    for cooldown, expected in factors.items():
        chosen = dataclasses.replace(recipe, cooldown=cooldown)
        assert [chosen.cooldown_factor(step) for step in range(8)] == expected


def test_growing_cuts_to_whole_pixels() -> None:
    assert growing(56, 1.2, 4) == (56, 67, 80, 96)  # 67.2, 80.4, 96.0
    assert growing(10, 1.5, 1) == (10,)


def test_recipes_are_found_by_name_or_used_as_they_are() -> None:
    assert find_recipe(DEFAULT).name == DEFAULT
    custom = RECIPES["rms"].with_settings(steps=2)
    assert find_recipe(custom) is custom
    with pytest.raises(RecipeNotFound, match=r"no recipe 'forier'; did you mean one of: fourier"):
        find_recipe("forier")


PLAIN: dict[str, Any] = {
    "name": "test",
    "source": "",
    "sizes": (8,),
    "steps": 1,
    "parameterization": choice("pixels"),
    "step_rule": choice("rms", rate=1.0),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ()}, "sizes and steps of at least 1"),
        ({"sizes": (0,)}, "sizes and steps of at least 1"),
        ({"sizes": (8.0,)}, "whole numbers"),
        ({"steps": 0}, "sizes and steps of at least 1"),
        ({"steps": True}, "whole numbers"),
        ({"seed": -1}, "at least 0"),
        ({"blur": -1}, "at least 0"),
        ({"cooldown": 1.5}, "0 to 1, not 1.5"),
        ({"blur": 16}, "a blur of 16 px is too wide for a picture of 8 px"),
        ({"display": "bright"}, "no part 'bright'; there are clip, stretch, standardise"),
        ({"parameterization": choice("wavelets")}, "no part 'wavelets'; there are pixels, fourier, maco"),
        ({"step_rule": choice("sgd", rate=1.0)}, "no part 'sgd'; there are max, std, rms"),
        ({"transforms": (choice("shear"),)}, "no part 'shear'; there are affine, jitter"),
        (
            {"parameterization": choice("pixels", hight=0.5)},
            r"'pixels'.*'hight'; its options are low, high, unit, whole",
        ),
        ({"parameterization": choice("maco", unit="byte")}, r"'maco'.*'unit'"),
        ({"parameterization": choice("pixels", start=3)}, r"'pixels'.*'start'"),
        ({"step_rule": choice("rms", rate=1.0, momentum=0.9)}, r"'rms'.*'momentum'; its options are rate, epsilon"),
        ({"step_rule": choice("rms")}, r"'rms'.*'rate'; its options are rate, epsilon"),
        ({"transforms": (choice("jitter", pixel=3),)}, r"'jitter'.*'pixel'; its options are pixels"),
    ],
)
def test_what_no_recipe_can_be_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    assert Recipe(**{**PLAIN, "blur": 15}).size == 8
    with pytest.raises(InvalidRequest, match=message):
        Recipe(**{**PLAIN, **change})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"fourier"', "{}", json.dumps({**RECIPES["rms"].as_dict(), "speed": 3})],
)
def test_what_is_no_recipes_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="this is not the JSON of a recipe"):
        Recipe.from_json(text)


def test_the_public_recipes_are_these() -> None:
    assert {"max-step", "std-step", "multi-scale", "rms", "fourier", "maco", "fast"} <= set(ph.RECIPES)


def test_a_picture_is_as_wide_as_its_layer_sees() -> None:
    recipe = RECIPES["fourier"]
    # 3.5 receptive fields, rounded up to a multiple of 8: 35 → 40, below 64; 84 → 88; 122.5 → 128; 238 is above 128
    assert [recipe.size_for(field) for field in (10, 24, 35, 68, None)] == [64, 88, 128, 128, 128]
    assert RECIPES["rms"].size_for(10) == 150
    assert recipe.with_settings(size=80).size_for(24) == 80


def test_receptive_fields_are_no_negative_number() -> None:
    with pytest.raises(InvalidRequest, match="receptive_fields"):
        dataclasses.replace(RECIPES["fourier"], receptive_fields=-1.0)


def test_a_recipe_without_receptive_fields_is_written_as_by_earlier_versions() -> None:
    assert "receptive_fields" not in RECIPES["vivid"].as_dict()
    assert RECIPES["vivid"].digest.startswith("547c1e9e62d2d19b")
    assert Recipe.from_json(RECIPES["vivid"].to_json()) == RECIPES["vivid"]
    assert RECIPES["fourier"].as_dict()["receptive_fields"] == 3.5
