"""Dead filters: marked in the result, the manifest and the grid, and brought to life before the activation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import phosphene as ph
from phosphene.images.grid import DEAD
from phosphene.rendering.batches import never_moved, without_contrast
from phosphene.rendering.recipes import RECIPES, Recipe, choice

QUICK = Recipe("quick", "", (16,), 2, choice("pixels", low=0.3, high=0.7), choice("rms", rate=2.0))


@pytest.fixture
def dead_net() -> nn.Sequential:
    """Return a convolution whose channel 1 has so low a bias that no picture in 0..1 gets it through the ReLU."""
    convolution = nn.Conv2d(3, 3, 3, padding=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        convolution.weight.copy_(0.3 * torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64))
        convolution.bias.copy_(torch.tensor([0.0, -100.0, 0.0]))  # type: ignore[union-attr]
    return nn.Sequential(convolution, nn.ReLU(inplace=True))


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"dream"}))
def test_a_dead_filter_is_marked_after_the_relu_and_followed_uphill_before_it(
    dead_net: nn.Sequential, name: str
) -> None:
    model = ph.load(dead_net, input_size=32)
    recipe = RECIPES[name].at(steps=4)
    recipe = dataclasses.replace(recipe, sizes=(12, 16) if len(recipe.sizes) > 1 else (16,))
    after = ph.render(model, ph.channel("1", range(3)), recipe)
    assert after.dead.tolist() == [False, True, False]
    assert after.scores[1] == after.start_scores[1] == 0
    before = ph.render(model, ph.channel("0", range(3)), recipe)
    assert before.dead.tolist() == [False] * 3
    # the mean of a bare convolution is the picture's mean over again, which maco fixes
    assert name == "maco" or before.scores[1] > before.start_scores[1]


def test_a_dead_filter_is_crossed_in_the_grid_and_named_in_the_manifest(
    dead_net: nn.Sequential, tmp_path: Path
) -> None:
    pictures = ph.render(ph.load(dead_net, input_size=32), ph.channel("1", range(3)), QUICK)
    pictures.save(tmp_path, columns=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [one["dead"] for one in manifest["pictures"]] == [False, True, False]
    sheet = np.asarray(pictures.grid(3).convert("RGB"))
    tiles = [sheet[:, 21 * index : 21 * index + 16] for index in range(3)]
    on_the_diagonal = [all((tile[k, k] == DEAD).all() for k in range(16)) for tile in tiles]
    assert on_the_diagonal == [False, True, False]
    assert np.array_equal(tiles[0], np.asarray(pictures.pictures[0]))


def test_a_picture_without_contrast_is_dead() -> None:
    # a filter of one pixel that likes brightness: the clipped picture is white all over
    net = nn.Sequential(nn.Conv2d(3, 1, 1)).double()
    with torch.no_grad():
        net[0].weight.fill_(1.0)  # type: ignore[operator]
    recipe = dataclasses.replace(QUICK, step_rule=choice("rms", rate=400.0))
    pictures = ph.render(ph.load(net, input_size=16), ph.channel("0", 0), recipe)
    assert bool(pictures.scores[0] > pictures.start_scores[0])
    assert pictures.dead.tolist() == [True]
    assert bool((pictures.displayed() == 255).all())


def test_contrast_is_what_is_shown_of_it() -> None:
    flat, faint, clear = torch.full((3, 1, 2, 2), 0.5).unbind()
    faint, clear = faint.clone(), clear.clone()
    faint[0, 0, 0] += 1.9 / 255
    clear[0, 0, 0] += 2.1 / 255
    assert without_contrast(torch.stack([flat, faint, clear])).tolist() == [True, True, False]


def test_the_first_max_steps_are_not_falsely_dead(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    # R1's start spans one byte; after one step of 2 bytes the bare picture has hardly more, but it is shown stretched
    one = ph.render(model, ph.channel("4", range(8)), "max-step", size=32, steps=1)
    assert not bool(one.dead.any())
    # the signed maximum may turn a step downhill; that filter has left its start all the same
    scores = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 2.0], [1.0, 0.0, 2.0 + 1e-6]])
    assert never_moved(torch.tensor([1.0, 0.0, 2.0]), scores).tolist() == [False, True, True]


def test_a_small_score_that_moves_is_not_dead() -> None:
    assert never_moved(torch.tensor([1e-9]), torch.tensor([[1.1e-9]])).tolist() == [False]
