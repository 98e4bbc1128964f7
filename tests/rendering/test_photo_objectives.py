"""Objectives that compare with a photo: values by hand and by plain loops, and the same transforms for both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import phosphene as ph
from phosphene.errors import ChannelNotFound, InvalidRequest, LayerRefused
from phosphene.rendering.objectives import InPhoto, Objective
from phosphene.rendering.photo_objectives import accent, caricature, perceptual_distance
from phosphene.rendering.recipes import Recipe, choice

IMAGE, ITEM = torch.empty(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
MOVED = Recipe(
    "moved",
    "",
    (24,),
    3,
    choice("pixels"),
    choice("rms", rate=20.0),
    (choice("affine", pixels=4.0, degrees=8.0, scale=0.1), choice("jitter", pixels=5), choice("blur")),
)


def maps(seed: int) -> Tensor:
    """Return the output of a layer of three channels for one picture, (1, 3, 4, 5) float64."""
    return torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7


def score(objective: Objective, picture: Tensor, photo: Tensor) -> float:
    return float(objective.score({"map": picture, InPhoto("map"): photo}, IMAGE, ITEM))


def entries(act: Tensor) -> list[list[float]]:
    """Return the values of each channel in a row."""
    return [channel.flatten().tolist() for channel in act[0]]


def test_the_distance_is_that_of_a_plain_loop() -> None:
    picture, photo = entries(maps(0)), entries(maps(1))
    left = sum((x - y) ** 2 for xs, ys in zip(picture, photo, strict=True) for x, y in zip(xs, ys, strict=True))
    expected = left / sum(y**2 for ys in photo for y in ys)
    assert score(perceptual_distance("map"), maps(0), maps(1)) == pytest.approx(expected, rel=1e-10)
    assert score(perceptual_distance("map"), maps(1), maps(1)) == 0
    assert score(perceptual_distance("map"), 3 * maps(1), maps(1)) == pytest.approx(4)  # |3y - y|² / |y|²


def test_the_accent_is_that_of_a_plain_loop() -> None:
    picture, photo = entries(maps(0))[2], entries(maps(1))
    everything = [y for ys in photo for y in ys]
    centre = sum(everything) / len(everything)
    deviation = math.sqrt(sum((y - centre) ** 2 for y in everything) / len(everything))
    mean = sum(photo[2]) / len(photo[2])
    weights = [max(0.0, y - mean) for y in photo[2]]
    changes = [x - y for x, y in zip(picture, photo[2], strict=True)]
    there = sum(weight * change for weight, change in zip(weights, changes, strict=True)) / sum(weights)
    gain = 0.75 * there + 0.25 * sum(changes) / len(changes)
    assert score(accent("map", 2), maps(0), maps(1)) == pytest.approx(gain / deviation, rel=1e-9)
    assert score(accent("map", 2), maps(1), maps(1)) == 0


def test_the_accent_looks_above_all_where_the_photo_excites_the_channel() -> None:
    photo = torch.tensor([[[[0.0, 0.0, 0.0, 4.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    elsewhere, there = photo.clone(), photo.clone()
    elsewhere[0, 0, 0, 0], there[0, 0, 0, 3] = 4.0, 8.0
    deviation = math.sqrt(16 / 8 - 0.5**2)
    assert score(accent("map", 0), elsewhere, photo) == pytest.approx(0.25 * 4 / 4 / deviation)
    assert score(accent("map", 0), there, photo) == pytest.approx((0.75 * 4 + 0.25 * 4 / 4) / deviation)
    # where the photo says nothing, every position counts alike
    flat = photo.clone()
    flat[0, 1] = torch.tensor([[2.0, 0.0, 0.0, 2.0]])
    assert score(accent("map", 1), flat, photo) == pytest.approx(1 / deviation)


def test_what_a_map_answers_to_the_border_is_not_accentuated() -> None:
    photo = torch.zeros(1, 1, 12, 24, dtype=torch.float64)
    photo[..., 0, :], photo[..., 1] = 9.0, 9.0  # in the outer twelfth, which is one row and two columns
    photo[..., 5, 5] = 200.0
    deviation = float(photo.std(correction=0))
    at_the_border, inside = photo.clone(), photo.clone()
    at_the_border[..., 0, 3] += 288.0
    inside[..., 5, 5] += 288.0
    assert score(accent("map", 0), at_the_border, photo) == pytest.approx(0.25 / deviation)
    assert score(accent("map", 0), inside, photo) == pytest.approx((0.75 * 288 + 0.25) / deviation)


def test_a_caricature_is_that_of_a_plain_loop() -> None:
    picture, photo = entries(maps(0)), entries(maps(1))
    means = [sum(ys) / len(ys) for ys in photo]
    us, vs = ([x - mean for xs, mean in zip(rows, means, strict=True) for x in xs] for rows in (picture, photo))
    product = sum(u * v for u, v in zip(us, vs, strict=True))
    length = sum(v * v for v in vs)
    cosine = product / math.sqrt(length * sum(u * u for u in us))
    for power in (0, 1, 2.5):
        expected = product / length * max(cosine, 0.1) ** power
        assert score(caricature("map", power), maps(0), maps(1)) == pytest.approx(expected, rel=1e-9)
        assert score(caricature("map", power), maps(1), maps(1)) == pytest.approx(1)


def test_twice_the_contrast_is_twice_the_caricature_and_vectors_have_one_too() -> None:
    photo = maps(1)
    mean = photo.mean((-2, -1), keepdim=True)
    assert score(caricature("map"), mean + 2 * (photo - mean), photo) == pytest.approx(2)
    vector = torch.tensor([[1.0, -2.0, 0.0]])
    assert score(caricature("map"), 3 * vector, vector) == pytest.approx(3)
    assert score(caricature("map"), torch.tensor([[0.0, 0.0, 5.0]]), vector) == 0


def test_layers_that_say_nothing_of_the_photo_divide_nothing_by_0() -> None:
    silent = torch.zeros(1, 2, 3, 3)
    for objective in (accent("map", 0), caricature("map"), perceptual_distance("map")):
        assert score(objective, silent, silent) == 0


def test_an_accent_needs_a_map_with_that_channel() -> None:
    with pytest.raises(ChannelNotFound, match="3 channels, 0 to 2; there is no 3"):
        score(accent("map", 3), maps(0), maps(1))
    with pytest.raises(LayerRefused, match="not a map of channels"):
        score(accent("map", 0), torch.zeros(1, 5), torch.zeros(1, 5))


def test_sums_and_multiples_compare_at_all_layers_of_their_terms() -> None:
    both = 2 * accent("a", 1) - 0.5 * perceptual_distance("b") + ph.channel("c", 3)
    assert (both.compared, both.layers) == (("a", "b"), ("a", "b", "c"))
    assert ph.channel("c", 3).compared == ()


def test_picture_and_photo_undergo_the_same_transforms(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    photo = torch.rand(1, 3, 24, 36, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    drawn = ph.render(model, ph.channel("4", 1) - 100 * perceptual_distance("4"), MOVED, size=24, photo=photo)
    still = ph.render(model, ph.channel("4", 1), MOVED, size=24, photo=photo)
    # the first picture is the photo: however both are moved, there is no distance, but there is later
    assert drawn.history[0].item() == pytest.approx(still.history[0].item(), rel=1e-12)
    assert drawn.history[-1].item() < still.history[-1].item() - 1e-3
    with torch.no_grad():
        acts, start = small_net[:5](drawn.images), small_net[:5](photo)
    distance = float((acts - start).square().sum() / start.square().sum())
    assert drawn.scores.item() == pytest.approx(float(acts[0, 1].mean()) - 100 * distance, rel=1e-9)


def test_the_distance_holds_a_picture_close_to_its_photo(small_net: nn.Sequential) -> None:
    model = ph.load(small_net, input_size=32)
    photo = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    changes = []
    for weight in (0.0, 1.0, 10.0):
        objective = ph.channel("4", 1) - weight * perceptual_distance("0")
        drawn = ph.render(model, objective, "accentuate", size=24, photo=photo)
        changes.append(float((drawn.images - photo).square().mean()))
    assert changes[0] > changes[1] > changes[2]


def test_without_a_photo_there_is_nothing_to_compare_with(small_net: nn.Sequential) -> None:
    with pytest.raises(InvalidRequest, match="give photo="):
        ph.render(ph.load(small_net, input_size=32), caricature("4"), MOVED)
